"""What the CUDA kernels issue, counted in their machine code by benchmarks/machine_code.py."""

import pytest

from benchmarks import machine_code

needs_tools = pytest.mark.skipif(
    machine_code.tool("nvcc") is None or machine_code.tool("nvdisasm") is None,
    reason="nvcc and nvdisasm were not found",
)

# a loop of two FMAs a turn, of which a rare branch would issue four more instructions
LISTING = """
\t.section\t.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, RZ ;                    /* 0x0000000000017202 */
                                                                   /* 0x000fe20000000f00 */
.L_x_1:
        /*0010*/                   LDS.128 R4, [R1] ;              /* 0x0000000001047984 */
                                                                   /* 0x000e280000000c00 */
        /*0020*/              @!P0 BRA `(.L_x_2) ;                 /* 0x0000000000008947 */
                                                                   /* 0x000fea0003800000 */
        /*0030*/                   STG.E R1, [R2.64] ;             /* 0x0000000102007986 */
                                                                   /* 0x000fe2000c101904 */
        /*0040*/                   STG.E R1, [R2.64] ;             /* 0x0000000102007986 */
                                                                   /* 0x000fe2000c101904 */
.L_x_2:
        /*0050*/                   FFMA R5, R4, R4, R5 ;           /* 0x0000000404057223 */
                                                                   /* 0x001fc80000000005 */
        /*0060*/                   FFMA R5, R4, R4, R5 ;           /* 0x0000000404057223 */
                                                                   /* 0x000fc80000000005 */
        /*0070*/               @P1 BRA `(.L_x_1) ;                 /* 0x0000000000001947 */
                                                                   /* 0x000fea000383ffff */
        /*0080*/                   EXIT ;                          /* 0x000000000000794d */
                                                                   /* 0x000fea0003800000 */
"""


def test_listing_is_read():
    (code,) = machine_code.parse(LISTING).values()
    assert [i.name for i in code] == ["MOV", "LDS", "BRA", "STG", "STG", "FFMA", "FFMA", "BRA", "EXIT"]
    assert code[1].width == 128
    assert code[1].write_barrier == 0
    assert code[5].wait == 1
    assert code[5].stall == 4
    assert machine_code.loops(code) == [(1, 7)]
    path = machine_code.best_path(code, 1, 7, machine_code.is_fma)
    assert path == [1, 2, 5, 6, 7]
    assert machine_code.count(code[k] for k in path)["FMA"] == 2
    # one warp waits for the load, 34 clocks, then for each FMA; a second one hides in that
    alone, two = (machine_code.simulate(code, path, warps, repeats=4) for warps in (1, 2))
    assert 34 <= alone <= 60
    assert alone / 2 <= two < 0.7 * alone


# issue slots for 32 FMAs, at most, in the worst loop of steps of a kernel (or in each), by d: FMAs of the products, for
# diagonal the recurrence's own
CEILINGS = {
    "momentum_dense": {
        ("momentum_dense_kernel", "gd"): {5: 60, 8: 47, 16: 50, 32: 54, 64: 43, 128: 43},
        ("momentum_dense_kernel", "momentum"): {5: 80, 8: 60, 16: 56, 32: 56, 64: 45, 128: 44},
        ("momentum_dense_backward_kernel", "gd"): {16: 71, 32: 60, 64: 53, 128: 58},
        # d = 32: 74 before these kernels left out a Q'a_1 that overflows where there is no y_0
        ("momentum_dense_backward_kernel", "momentum"): {16: 92, 32: 77, 64: 59, 128: 61},
    },
    "momentum_diagonal": {
        ("momentum_diagonal_kernel", "gd"): {0: 43},
        ("momentum_diagonal_kernel", "momentum"): {0: 46},
        ("momentum_diagonal_backward_kernel", "gd"): {0: 48},
        ("momentum_diagonal_backward_kernel", "momentum"): {0: 46},
        ("momentum_diagonal_backward_kernel", "gd, scheduled"): {0: 69},
        ("momentum_diagonal_backward_kernel", "momentum, scheduled"): {0: 128},
    },
    "momentum_resident": {
        ("momentum_resident_kernel", "gd"): {256: 61},
        ("momentum_resident_backward_kernel", "gd"): {256: {"replay": 78, "adjoint": 72, "outer": 40}},
    },
    # 49 before a thread had five entries and read the weights four at a time, and then for 40 of 64 threads
    "rnn": {
        ("rnn_kernel", "20-20-20"): {5: {"product": 38, "own Q": 48}},
        ("rnn_backward_kernel", "20-20-20"): {5: {"product": 38, "own Q": 48, "outer": 41}},
    },
}


@needs_tools
@pytest.mark.parametrize("stem", CEILINGS)
def test_ceilings(stem):
    """No step issues more than it did, so that what makes one longer is seen without a GPU; no local memory."""
    kernels = [k for k in machine_code.KERNELS if k.stem == stem]
    seen = set()
    for row in machine_code.rows(kernels, steps=()):
        assert row["local_bytes"] == 0, row
        ceiling = CEILINGS[stem].get((row["kernel"], row["method"]), {}).get(row["d"])
        if ceiling is not None:
            seen.add((row["kernel"], row["method"], row["d"]))
            assert row["slots_per_32_fma"] <= (ceiling[row["loop"]] if isinstance(ceiling, dict) else ceiling), row
    assert len(seen) == sum(map(len, CEILINGS[stem].values()))


@needs_tools
def test_results_leave_in_16_byte_stores():
    """The compiler makes four stores of a struct of four floats where nothing keeps it from that."""
    for kernel in machine_code.KERNELS:
        if kernel.stem == "momentum_diagonal":
            code, *_ = machine_code.compiled(kernel.stem)[kernel.symbol]
            assert sum(i.name == "STG" and i.width == 128 for i in code) >= (3 if kernel.direction == "backward" else 1)
