"""The paper's theory in tables and figures, measured with the layers and beside trained models."""
