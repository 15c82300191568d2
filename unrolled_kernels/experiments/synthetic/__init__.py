"""The paper's synthetic task (Sec. 7.1): GD and NAG layers above a network that puts out the energy's matrix."""
