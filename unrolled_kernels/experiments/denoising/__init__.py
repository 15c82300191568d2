"""The paper's denoising task (Sec. 7.2): GD and NAG layers above networks that put out the energy of an image."""
