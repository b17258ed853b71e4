"""The attention loss benchmark on small shapes: its methods, what it measures, what it writes."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from benchmarks.attention_loss import report
from benchmarks.attention_loss.agreement import SMALL, assert_methods_agree, cast, results
from benchmarks.attention_loss.cases import (
    METHODS,
    Geometry,
    Replayed,
    all_text_rows,
    gathered_rows,
    make_step,
    our_mask_loss,
    plain_mask_loss,
    this_project,
)
from benchmarks.attention_loss.measure import (
    ATTENTION,
    LOSS_OURS,
    LOSS_PLAIN,
    LossRun,
    Record,
    Run,
    Setting,
    attention_record,
    cpu_model,
    full_size,
    make_record,
    measure_memory,
    measured_layers,
)
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
    with pytest.raises(AssertionError, match="this_project, torch.float64: ∂query"):
        assert_methods_agree()


@pytest.mark.parametrize("method", [this_project, gathered_rows, all_text_rows])
def test_a_replayed_attention_changes_nothing(method):
    """One layer, the first run: what comes later finds gradients that have been added to."""
    one = replace(SMALL, supervised=1, num_layers=1)
    step = make_step(271, 5, one, dtype=torch.float32)
    replayed = replace(step, attention=Replayed(TorchCpu(), step))
    expected, actual = (results(s, method) for s in (step, replayed))
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
    assert step.queries.key_sets.tolist() == [list(range(251 - 4 * height * width, 251))]
    assert step.queries.position.min() >= 251
    assert len(step.targets) == 5 * 4 and len(step.masks) == 3 * 4  # two rows an object
    assert all(0 < mask.sum() < mask.numel() for mask in step.targets.masks)
    assert all(torch.equal(a, b) for a, b in zip(step.masks, step.targets.masks, strict=True))


def small_run(method, layers=None, length=271):
    case = METHODS[method]
    step = Setting(length, SMALL).step(5)
    return Run(step, case, layers or case.num_layers(SMALL))


def measured(run):
    with measure_memory(run) as memory:
        run(*run.set_up()[0])
    return memory


@pytest.mark.parametrize("layers", [3, 4])
def test_layers_left_out_are_added_exactly(layers):
    """Bytes of 3 and of 4 layers, the rest added, are those of all 5."""
    part, whole = (make_record("", run, 1, 1.0, measured(run)) for run in map(small_published, (layers, 5)))
    assert (part.layers, part.layers_measured, whole.layers_measured) == (5, layers, 5)
    assert part.measured_peak_bytes < whole.measured_peak_bytes == whole.peak_bytes
    assert part.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert part.kept_bytes == pytest.approx(whole.kept_bytes, rel=1e-3)
    assert part.saved_bytes == whole.saved_bytes
    assert part.seconds > part.measured_seconds == 1.0


def small_published(layers):
    return small_run("all text rows", layers)


def test_saved_memory_of_the_published_way_is_what_it_must_be():
    """Per layer: the fp32 probabilities, the repeated keys, and the query rows where they are no view."""
    memory = measured(small_published(5))
    probabilities, repeated = 6 * 20 * 271 * 4, 6 * 271 * 16 * 2
    assert memory.saved_by_layer == pytest.approx(probabilities + repeated, rel=0.05)
    assert memory.kept_by_layer == pytest.approx(1.5 * probabilities + repeated, rel=0.05)  # and rounded to bf16
    assert memory.shapes[0] == ((1, 6, 20, 271), torch.float32)


def test_gathered_rows_keep_their_probabilities_and_this_project_does_not():
    step = small_run("gathered rows").step
    large = measured(small_run("gathered rows"))
    assert ((6, 5, 268), torch.float32) in large.shapes
    assert full_size(large.shapes, step)
    ours = measured(small_run("this project"))
    assert ours.saved < large.saved
    assert ours.saved_by_layer < 5 * 6 * 251 * 4  # not the probabilities of the rows


def test_full_size():
    step = make_step(271, 5, SMALL)
    video = step.queries.key_sets.shape[1]
    assert full_size([((6, 5, video), torch.float32), ((5,), torch.float32)], step) == f"6 x 5 x {video} float32"
    assert full_size([((6, 271, 16), torch.bfloat16)], step)
    assert not full_size([((6, 5, video - 1), torch.float32), ((1000, 1000), torch.bool)], step)


def test_a_small_budget_means_fewer_layers():
    step = make_step(1024, 8)
    published = METHODS["all text rows"]
    layer = 300 * 28 * 1024 * 6 + 28 * 1024 * 128 * 2
    loss = 720 * 1280 * 4 * (128 + 32)
    assert measured_layers(step, published, 28 * layer + loss) == 28
    assert measured_layers(step, published, 28 * layer + loss - 1) == 7
    assert measured_layers(step, published, 7 * layer + loss - 1) == 6
    assert measured_layers(step, METHODS["this project"], 0) == 6


def test_mask_loss_alone():
    step = cast(make_step(271, 5, SMALL), torch.float32)
    ours, plain = (LossRun(step, loss) for loss in (our_mask_loss, partial(plain_mask_loss, numerics="stable")))
    assert all(torch.equal(a, b) for a, b in zip(ours.maps, plain.maps, strict=True))
    found, expected = (run.loss(run.maps, step) for run in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    memory = measured(plain)
    assert memory.saved >= 20 * 45 * 80 * 4  # 5 rows x 4 patches, the upsampled predictions
    assert memory.peak > memory.kept >= memory.saved


def some_records():
    """Of every method at every length: `this project` costs 1, the others more."""
    records = []
    for length in (8192, 16384, 32768):
        records.append(
            replace(attention_record(make_step(271, 1, SMALL), 1.0), length=length, grid="", seconds=length / 10)
        )
        for rows in (8, 64):
            for method, factor in (("this project", 1), ("gathered rows", 5), ("all text rows", 1000)):
                size = {name: factor * length for name in ("seconds", "measured_seconds", "peak_bytes", "saved_bytes")}
                more = {"kept_bytes": 7, "grid": "3 x 4", "cpu": "a CPU", "largest_saved": "3 x 4 float32"}
                records.append(Record(length, rows, method, layers=6, layers_measured=6, rounds=3, **size, **more))
    for method, factor in ((LOSS_OURS, 1), (LOSS_PLAIN, 10)):
        size = {name: factor for name in ("seconds", "measured_seconds", "peak_bytes", "saved_bytes", "kept_bytes")}
        records.append(Record(16384, 8, method, layers=6, layers_measured=6, rounds=3, **size, grid="3 x 4"))
    return records


def test_files(tmp_path):
    records = some_records()
    report.write(records[:2], tmp_path)
    report.write([replace(records[0], seconds=1e3), *records[2:]], tmp_path)
    report.write(records[:1], tmp_path)  # in the place of what was measured before
    report.draw(tmp_path)
    ordered = sorted(records, key=lambda record: (record.length, record.rows, record.method))
    assert report.read(tmp_path / "attention_loss.csv") == ordered
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".png"}
    text = (tmp_path / "attention_loss.md").read_text()
    assert "| 16,384 | 3 x 4 | 8 | all text rows | 16,384,000 s |" in text
    header = (tmp_path / "attention_loss.csv").read_text().splitlines()[0]
    assert header == ",".join(field.name for field in fields(Record))
    report.draw(tmp_path)  # from the file alone
    assert (tmp_path / "attention_loss.md").read_text() == text


def test_targets_are_printed_met_or_not():
    records = some_records()
    found = {target.what: target for target in report.targets(report.Figures(records))}
    assert found["time, of all text rows"].met  # 1/1000
    assert found["peak, of all text rows"].met
    assert found["linear growth: 32,768 over 16,384 tokens, 8 rows: time"].ratio == 2
    assert not found["mask loss alone: peak, of a plain one"].met  # 1/10
    assert found["mask loss alone: time, of a plain one"].met
    assert not found["time, of the flash attention of six layers"].met  # 1 / 0.6
    text = report.draw_text(records)
    assert "| mask loss alone: peak, of a plain one | at most 1/20 | 0.10 | **not met** |" in text
    assert text.count("**not met**") == sum(not target.met for target in found.values())
    large = [replace(r, full_size_saved="9 x 9 float32") if r.method == "this project" else r for r in records]
    assert "9 x 9 float32 at 16,384" in report.draw_text(large)
    assert "Not measured" in report.draw_text([r for r in records if r.length == 8192])


def test_cpu_model(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 9\n\nmodel name\t: Some CPU 9\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU 9"
    assert cpu_model(tmp_path / "missing")
    assert ATTENTION not in METHODS
