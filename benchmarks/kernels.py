"""Measures the kernels beside the fewest bytes they must move and beside other libraries' kernels.

    python benchmarks/kernels.py                  # the GPU's table and results/<gpu>-kernels.json
    python benchmarks/kernels.py --quick          # small sizes, nothing written
    python benchmarks/kernels.py --device cpu     # tiny sizes on the torch reference: does the script run?

This file does nothing when imported: transformers looks for a library called `kernels`, and finds it here.
"""

if __name__ == "__main__":
    from kernel_bench.run import main

    main()
