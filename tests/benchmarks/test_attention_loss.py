"""The attention loss benchmark on small shapes: its methods, what it measures, what it writes."""

from dataclasses import fields, replace

import pytest
import torch

from benchmarks.attention_loss import __main__ as driver
from benchmarks.attention_loss import report
from benchmarks.attention_loss.agreement import SMALL, assert_methods_agree, compute_results
from benchmarks.attention_loss.inputs import Geometry, Replayed, make_step, project
from benchmarks.attention_loss.measure import (
    ATTENTION,
    AttentionRun,
    LossRun,
    Record,
    Run,
    count_layers,
    find_full_size,
    measure,
    measure_length,
    open_records,
)
from benchmarks.attention_loss.methods import LOSS_OURS, LOSS_PLAIN, METHODS
from swim_kernels.flash_noun_attention.providers.torch import TorchCpu


@pytest.fixture(autouse=True)
def one_thread():
    """Shapes are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_methods_agree():
    assert_methods_agree()


def test_a_wrong_gradient_is_noticed(monkeypatch):
    """An error of 1e-4 in one gradient of the maps is lost beside the attention's gradient, but not in this check."""
    from swim_kernels.noun_attention import torch_backend

    right = torch_backend.add_gradients

    def wrong(grad_query, grad_key, grad_maps, *arguments, **options):
        right(grad_query, grad_key, grad_maps * 1.0001, *arguments, **options)

    monkeypatch.setattr(torch_backend, "add_gradients", wrong)
    with pytest.raises(AssertionError, match="swim_fast, torch.float64: ∂query"):
        assert_methods_agree()


@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_attention_changes_nothing(method):
    """One layer, the first run: what comes later finds gradients that have been added to."""
    one = replace(SMALL, supervised=1, num_layers=1)
    step = make_step(271, 5, one, dtype=torch.float32)
    replayed = replace(step, attention=Replayed(TorchCpu()))
    replayed.attention.compute(step)
    expected, actual = (compute_results(s, METHODS[method].forward) for s in (step, replayed))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("length", [4096, 8192, 16384, 32768])
def test_grid_fills_the_length(length):
    geometry = Geometry()
    height, width = geometry.grid(length)
    rest = length - geometry.text - geometry.patches * height * width
    assert 0 <= rest < 0.05 * length
    assert 0.4 < height / width < 0.75  # of 720 x 1280: 0.56


def test_inputs():
    step = make_step(271, 5, SMALL)
    height, width = step.grid
    step.queries.check(1, 271)
    step.targets.check(5, 4 * height * width)
    step.patch_queries.check(1, 271)
    step.patch_targets.check(5 * 4, height * width)
    patches = step.patch_queries.key_sets[step.patch_queries.key_set]
    assert torch.equal(patches.view(5, -1), step.queries.key_sets.expand(5, -1))
    for (query, key, _), (hidden, *weights) in zip(step.layers, step.sources, strict=True):
        for made, weight in zip((query, key), weights, strict=True):
            assert torch.equal(made[0], project(hidden, weight, step.rotation, 16))
    assert step.queries.key_sets.tolist() == [list(range(251 - 4 * height * width, 251))]
    assert step.queries.position.min() >= 251
    assert len(step.targets) == 5 * 4 and len(step.masks) == 3 * 4  # two rows an object
    assert all(0 < mask.sum() < mask.numel() for mask in step.targets.masks)
    assert all(torch.equal(a, b) for a, b in zip(step.masks, step.targets.masks, strict=True))


def small_run(method, layers=None, length=271):
    """A run of a method whose memory has been counted."""
    attention = AttentionRun(make_step(length, 5, SMALL))
    attention.time()
    step = replace(attention.step, attention=attention.replayed)
    run = Run(method, step, METHODS[method], layers or METHODS[method].num_layers(SMALL))
    run.count()
    return run


@pytest.mark.parametrize("layers", [3, 4])
def test_layers_left_out_are_added_exactly(layers):
    """Bytes of 3 and of 4 layers, the rest added, are those of all 5."""
    part, whole = (small_run("all text rows", number).record(1.0) for number in (layers, 5))
    assert (part.layers, part.layers_measured, whole.layers_measured) == (5, layers, 5)
    assert part.measured_peak_bytes < whole.measured_peak_bytes == whole.peak_bytes
    assert part.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert part.kept_bytes == pytest.approx(whole.kept_bytes, rel=1e-3)
    assert part.saved_bytes == whole.saved_bytes
    assert part.seconds > part.measured_seconds == 1.0


def test_saved_memory_of_the_published_way_is_what_it_must_be():
    """Per layer: the fp32 probabilities, the repeated keys, and the query rows where they are no view."""
    memory = small_run("all text rows", 5).memory
    probabilities, repeated = 6 * 20 * 271 * 4, 6 * 271 * 16 * 2
    assert memory.saved_by_layer == pytest.approx(probabilities + repeated, rel=0.05)
    assert memory.kept_by_layer == pytest.approx(1.5 * probabilities + repeated, rel=0.05)  # and rounded to bf16
    assert memory.shapes[0] == ((1, 6, 20, 271), torch.float32)


def test_saved_memory_of_the_recomputed_way_is_what_it_must_be():
    """Per layer: the fp32 probabilities of the nouns' rows, the repeated keys, and what the projections save."""
    memory = small_run("recomputed q and k", 5).memory
    step = make_step(271, 5, SMALL)
    probabilities, repeated = 6 * 5 * step.queries.key_sets.shape[1] * 4, 6 * 271 * 16 * 2
    rows = 5 * (96 + 2 * 96) * 2 + 2 * 5 * 16 * 2  # hidden states and rotation of the rows, their scaled scores' query
    assert probabilities + repeated <= memory.saved_by_layer <= (probabilities + repeated + rows) * 1.2


def test_gathered_rows_keep_their_probabilities_and_swim_fast_does_not():
    run = small_run("gathered rows")
    large = run.memory
    height, width = run.step.grid
    assert ((6, 5, 4, height * width), torch.float32) in large.shapes
    assert find_full_size(large.shapes, run.step)
    ours = small_run("swim_fast").memory
    assert ours.saved < large.saved
    assert small_run("swim_fast, causal").memory.saved < large.saved
    assert ours.saved_by_layer < 5 * 6 * 251 * 4  # not the probabilities of the rows


def test_full_size():
    step = make_step(271, 5, SMALL)
    video = step.queries.key_sets.shape[1]
    assert find_full_size([((6, 5, video), torch.float32), ((5,), torch.float32)], step) == f"6 x 5 x {video} float32"
    assert find_full_size([((6, 271, 16), torch.bfloat16)], step)
    assert not find_full_size([((6, 5, video - 1), torch.float32), ((1000, 1000), torch.bool)], step)


def test_a_small_budget_means_fewer_layers():
    step = make_step(1024, 8)
    published = METHODS["all text rows"]
    layer = 300 * 28 * 1024 * 6 + 28 * 1024 * 128 * 2
    loss = 720 * 1280 * 4 * (128 + 32)
    assert count_layers(step, published, 28 * layer + loss) == 28
    assert count_layers(step, published, 28 * layer + loss - 1) == 7
    assert count_layers(step, published, 7 * layer + loss - 1) == 6
    assert count_layers(step, METHODS["swim_fast"], 0) == 6


def test_mask_loss_alone():
    step = make_step(271, 5, SMALL).cast(torch.float32)
    ours, plain = (LossRun(name, step) for name in (LOSS_OURS, LOSS_PLAIN))
    assert all(torch.equal(a, b) for a, b in zip(ours.maps, plain.maps, strict=True))
    found, expected = (run.loss(run.maps, step) for run in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    plain.count()
    memory = plain.memory
    assert memory.saved >= 20 * 45 * 80 * 4  # 5 rows x 4 patches, the upsampled predictions
    assert memory.peak > memory.kept >= memory.saved


def some_records():
    """Of every method at every length: swim_fast costs 1, the others more."""
    records = []
    for length in (8192, 16384, 32768):
        attention = AttentionRun(make_step(271, 1, SMALL)).record(1.0)
        records.append(replace(attention, length=length, grid="", seconds=length / 10))
        for rows in (8, 64):
            factors = {"swim_fast": 1, "gathered rows": 5, "recomputed q and k": 100, "all text rows": 1000}
            for method, factor in factors.items():
                size = {name: factor * length for name in ("seconds", "measured_seconds", "peak_bytes", "saved_bytes")}
                more = {"kept_bytes": 7, "grid": "3 x 4", "cpu": "a CPU", "largest_saved": "3 x 4 float32"}
                records.append(Record(length, rows, method, layers=6, layers_measured=6, rounds=3, **size, **more))
    for method, factor in ((LOSS_OURS, 1), (LOSS_PLAIN, 10)):
        size = {name: factor for name in ("seconds", "measured_seconds", "peak_bytes", "saved_bytes", "kept_bytes")}
        records.append(Record(16384, 8, method, layers=6, layers_measured=6, rounds=3, **size, grid="3 x 4"))
    return records


def test_files(tmp_path):
    records = some_records()
    file = open_records(tmp_path / "attention_loss.csv")
    file.put(*records[:2])
    file.put(replace(records[0], seconds=1e3), *records[2:])
    open_records(tmp_path / "attention_loss.csv").put(records[0])  # in the place of what was measured before
    report.draw(tmp_path)
    assert list(open_records(tmp_path / "attention_loss.csv").records.values()) == records
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".png"}
    text = (tmp_path / "attention_loss.md").read_text()
    assert "| 16,384 | 3 x 4 | 8 | all text rows | 16,384,000 s |" in text
    header = (tmp_path / "attention_loss.csv").read_text().splitlines()[0]
    assert header == ",".join(field.name for field in fields(Record))
    report.draw(tmp_path)  # from the file alone
    assert (tmp_path / "attention_loss.md").read_text() == text


def test_targets_are_printed_met_or_not():
    records = some_records()
    found = {target.name: target for target in report.compute_targets(report.Figures(records))}
    assert found["time, of all text rows"].met  # 1/1000
    assert found["peak, of all text rows"].met and found["peak, of recomputed q and k"].met
    assert found["linear growth: 32,768 over 16,384 tokens, 8 rows: time"].value == 2
    assert not found["mask loss alone: peak, of a plain one"].met  # 1/10
    assert found["mask loss alone: time, of a plain one"].met
    assert not found["time, of the flash attention of six layers"].met  # 1 / 0.6
    text = report.draw_text(records)
    assert "| mask loss alone: peak, of a plain one | at most 1/20 | 0.10 | **not met** |" in text
    assert text.count("**not met**") == sum(not target.met for target in found.values())
    large = [replace(r, full_size_saved="9 x 9 float32") if r.method == "swim_fast" else r for r in records]
    assert "9 x 9 float32 at 16,384" in report.draw_text(large)
    assert "Not measured" in report.draw_text([r for r in records if r.length == 8192])


def test_committed_report_is_drawn_from_the_committed_records():
    records = open_records(report.HERE / report.CSV).records.values()
    assert report.draw_text(records) == (report.HERE / report.REPORT).read_text(encoding="utf-8")


def test_rounds_alternate_and_the_rest_is_counted():
    called = []

    class Watched(AttentionRun):
        def time(self):
            called.append(self.name)
            return float(len(called))

    runs = [Watched(make_step(271, 1, SMALL), rounds) for rounds in (3, 1)]
    for run, name in zip(runs, "ab", strict=True):
        run.name = name
    found = {record.rounds: record.seconds for record in measure(runs)}
    assert called == ["a", "b", "a", "a", "a"]  # the last one is counted, not timed
    assert found == {1: 2.0, 3: 3.0}  # the medians of 1, 3, 4 and of 2


def test_measure_length():
    records = list(measure_length(271, [5, 3], None, 10**9, SMALL))
    measured = {(record.rows, record.method): record for record in records}
    assert set(measured) == {(0, ATTENTION), *((rows, method) for rows in (5, 3) for method in METHODS)}
    assert len(records) == 1 + 2 * len(METHODS) and all(record.seconds > 0 for record in records)
    assert {record.rounds for record in records if record.method == "all text rows"} == {1}
    ours, published = measured[5, "swim_fast"], measured[5, "all text rows"]
    assert ours.peak_bytes < published.peak_bytes and not ours.full_size_saved and published.full_size_saved
    assert measured[0, ATTENTION].peak_bytes is None


def test_nothing_is_measured_unless_the_methods_agree(monkeypatch, tmp_path):
    def disagree():
        raise AssertionError("swim_fast, torch.float64: ∂query")

    monkeypatch.setattr(driver, "assert_methods_agree", disagree)
    monkeypatch.setattr("sys.argv", ["attention_loss", "--lengths", "271", "--output", str(tmp_path)])
    with pytest.raises(AssertionError, match="∂query"):
        driver.main()
    assert not list(tmp_path.iterdir())


def test_quick_changes_the_defaults_only(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(driver, "assert_methods_agree", lambda: None)
    monkeypatch.setattr(driver, "measure_all", lambda *arguments: measured.append(arguments))
    monkeypatch.setattr(driver, "draw", lambda folder: (folder / report.REPORT).write_text("report"))
    monkeypatch.setattr("sys.argv", ["attention_loss", "--quick", "--rounds", "2", "--output", str(tmp_path)])
    driver.main()
    assert measured == [([4096], [8], 2, 8 * 2**30, tmp_path / "attention_loss.csv")]
