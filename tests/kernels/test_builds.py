"""What `benchmarks/kernels/builds.py` reads from an ahead-of-time build, on kernels where it is known."""

import pytest
import triton
import triton.language as tl

from benchmarks.kernels.builds import TENSOR_CORES, build, global_accesses


@triton.jit
def _scores(query, key, out, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    keys, dims = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    k = tl.load(key + keys[:, None] * stride + dims[None, :])
    q = tl.load(query + dims[:, None] + tl.arange(0, 16)[None, :] * HEAD_DIM)
    tl.store(out + keys[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(k, q))


@triton.jit
def _too_much_at_once(x, out, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * BLOCK + columns[None, :])
    for _ in range(3):
        tile = tl.dot(tile, tile, input_precision="ieee")
    tl.store(out + rows[:, None] * BLOCK + columns[None, :], tile)


def _build_scores(arch, aligned=frozenset({"query", "key", "out", "stride"})):
    signature = {"query": "*bf16", "key": "*bf16", "out": "*fp32", "stride": "i64"}
    constexprs = {"BLOCK": 64, "HEAD_DIM": 64}
    return build(_scores, signature, constexprs, arch=arch, num_warps=4, num_stages=2, aligned=aligned)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_tensor_cores_of_the_architecture_are_seen_and_no_others(arch):
    instructions = _build_scores(arch).tensor_cores
    assert [kind for kind, count in instructions.items() if count] == [TENSOR_CORES[arch]]


def test_width_of_loads_by_argument():
    build = _build_scores(90)
    assert set(build.loads) == {"query", "key"} and set(build.stores) == {"out"}
    assert set(build.loads["key"]) == {16}
    assert build.spill_stores == build.spill_loads == build.stack == 0
    assert 0 < build.registers <= 255 and build.shared >= 64 * 64 * 2


def test_a_stride_that_may_be_odd_makes_narrow_loads():
    assert max(_build_scores(90, frozenset({"query", "key", "out"})).loads["key"]) < 16


def test_spills_are_seen():
    build_ = build(
        _too_much_at_once,
        {"x": "*fp32", "out": "*fp32"},
        {"BLOCK": 128},
        arch=80,
        num_warps=4,
        num_stages=1,
        aligned=frozenset({"x", "out"}),
    )
    assert build_.spill_stores and build_.spill_loads and build_.stack


def test_forgotten_arguments_are_named():
    with pytest.raises(ValueError, match="_scores: neither type nor value for stride, HEAD_DIM"):
        build(
            _scores,
            {"query": "*bf16", "key": "*bf16", "out": "*fp32"},
            {"BLOCK": 64},
            arch=90,
            num_warps=4,
            num_stages=1,
        )


def test_addresses_are_followed_through_loops_and_selections():
    ptx = """
    ld.param.b64 \t%rd1, [kernel_param_0];
    ld.param.b64 \t%rd2, [kernel_param_1];
    ld.param.b64 \t%rd9, [kernel_param_2];
    mov.b64 \t%rd4, %rd1;
    $L:
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
    add.s64 \t%rd5, %rd4, %rd9;
    mov.b64 \t%rd4, %rd5;
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
    mad.wide.s32 \t%rd6, %r1, 2, %rd2;
    st.global.v2.b16 \t[ %rd6 + 64 ], { %rs1, %rs2 };
    """
    loads, stores = global_accesses(ptx, [("key", True), ("query", True), ("stride", False)])
    assert loads == {"key": {16: 1}, "query": {16: 1}}
    assert stores == {"query": {4: 1}}
