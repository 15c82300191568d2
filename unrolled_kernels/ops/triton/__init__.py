"""What the Triton kernels of all op families share; importing ``launch`` or ``tile`` imports Triton."""
