"""``python -m unrolled_kernels.experiments.denoising``: the subcommand under a name that ``torchrun -m`` can start."""

import os
import sys

from unrolled_kernels.experiments import cli

if __name__ == "__main__":
    code = cli.main(["denoising", *sys.argv[1:]])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # DistributedDataParallel keeps gloo's threads beyond destroy_process_group, and one that lets go of its last
        # tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291): leave without shutdown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
