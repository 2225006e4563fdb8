"""``python -m sparsespec_compile.kernels.tuning``; see ``tune``."""

from .tune import main

if __name__ == "__main__":
    main()
