"""The committed builds of kernels: by more than one triton, of the tiles that the table chooses, without objection."""

from benchmarks.kernels.configurations import all_configurations
from benchmarks.kernels.records import open_builds, open_fixed, open_traffic
from benchmarks.kernels.report import HERE, REPORT, draw_text

BUILDS = list(open_builds(HERE).records.values())
FIXED = list(open_fixed(HERE).records.values())
VERSIONS = sorted({record.triton for record in BUILDS})


def test_each_version_built_what_the_table_chooses():
    chosen = list(all_configurations(dtypes=("bf16",), head_dims=(128, 64), block_heads=(8,)))
    expected = sorted(
        (c.kernel, c.architecture, c.head_dim, c.add, c.over_set, *vars(c.tile).values(), c.readout) for c in chosen
    )
    assert VERSIONS[0] == "3.6.0" and len(VERSIONS) > 1
    for version in VERSIONS:
        built = [record for record in BUILDS if record.triton == version]
        found = sorted(
            (
                *(record.kernel, int(record.arch[3:]), record.head_dim, bool(record.add), bool(record.over_set)),
                *(record.block_rows, record.block_heads, record.block_keys, record.warps, record.stages),
                record.readout or "mean",
            )
            for record in built
        )
        assert found == expected


def test_none_is_objected_to_but_few_spills_of_the_oldest_triton():
    objections = [record for record in [*BUILDS, *FIXED] if record.complaints]
    assert all(record.triton == "3.6.0" and record.readout in ("each", "mass") for record in objections)
    assert all(record.complaints.startswith("spills") and record.spill_loads <= 16 for record in objections)
    assert len(objections) <= 7
    spilling = [record for record in BUILDS if record.arch == "sm_90" and record.spill_stores + record.spill_loads]
    assert spilling == objections


def test_the_report_has_a_part_for_each_version():
    report = draw_text(BUILDS, FIXED, open_traffic(HERE).records.values())
    parts = [line for line in report.splitlines() if line.startswith("### triton ")]
    assert parts == [f"### triton {version}" for version in VERSIONS]
    assert (HERE / REPORT).read_text(encoding="utf-8") == report
    fixed = [{(r.op, r.build, r.arch) for r in FIXED if r.triton == version} for version in VERSIONS]
    assert all(builds == fixed[0] for builds in fixed)
