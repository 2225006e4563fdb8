"""Report and dumps: what the compiler did, for people."""

import ast
import io

import pytest
from rich.console import Console

from sparsespec_compile.passes.pipeline import PASSES, SPLIT, compile_model
from sparsespec_compile.passes.report import fold

from .families import tiny

NAMES = [
    "normalise",
    "prove row locality",
    "experts to kernel",
    "split the vocabulary",
    "reduce sums",
    "attention to dual mode",
    "fuse projections",
    "halve products",
    SPLIT,
]


def test_passes_are_reported_in_order(bench):
    report = bench("gemma2").compiled.report
    assert [*(kind.name for kind in PASSES), SPLIT] == NAMES
    assert [record.name for record in report.passes] == ["capture", *NAMES]
    assert all(record.seconds > 0 for record in report.passes)
    idle = [record.name for record in report.passes if record.matches == 0]
    assert idle == [
        "experts to kernel",
        "split the vocabulary",
        "reduce sums",
        "halve products",
    ]  # whole, dense, on a CPU
    assert report.seconds == pytest.approx(sum(record.seconds for record in report.passes))


def test_every_attention_node_is_reported(bench):
    case = bench("gemma2")
    for record, layer in zip(case.compiled.report.attention, case.compiled.layout.layers, strict=True):
        assert record.module == f"model.layers.{layer.layer}.self_attn"
        assert record.outcome == "rewritten"
        assert record.layer == layer


def test_report_prints(bench):
    report = bench("gemma2").compiled.report
    text = str(report)
    for word in ("Gemma2ForCausalLM", "torch", *NAMES, "model.layers.1.self_attn", "rewritten", "0.3536", "20", "5.0"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
    assert "rewritten" in report._repr_mimebundle_((), ())["text/html"]
    assert "split into regions: 3 regions, 3 distinct" in text
    fused = "fused model.layers.*.mlp.gate_proj.weight + model.layers.*.mlp.up_proj.weight (* = 0-1)"
    assert fused in " ".join(text.split())
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report)
    assert "attention nodes" in console.export_text()


def test_equal_layers_share_a_line():
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    report = compile_model(tiny("gemma3_text", num_hidden_layers=6, layer_types=kinds * 2), page_size=16).report
    text = " ".join(str(report).split())
    assert "0-1, 3-4" in text
    assert "2, 5" in text
    assert text.count("rewritten") == 2
    assert len(str(report).splitlines()) < 35
    assert len(report.attention) == 6


def test_notes_of_unlike_layers_stay_apart():
    notes = [
        "left a.0.b: tied",
        "left a.1.b: tied",
        "left a.3.b: tied",
        "left a.2.c: tied",
        "left a.0.b + a.1.b",
        "none",
    ]
    assert fold(notes) == ["left a.*.b: tied (* = 0-1, 3)", "left a.2.c: tied", "left a.0.b + a.1.b", "none"]


def test_without_dumps_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSESPEC_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    compile_model(tiny("llama"), page_size=16)
    assert not list(tmp_path.iterdir())


def test_dumps_show_the_graph_before_and_after_each_pass(tmp_path, monkeypatch):
    folder = tmp_path / "graphs"
    monkeypatch.setenv("SPARSESPEC_DUMP", str(folder))
    compile_model(tiny("llama"), page_size=16)
    files = sorted(file.name for file in folder.iterdir())
    assert files == [
        f"{number:02d}_{name.replace(' ', '_')}_{moment}.py"
        for number, name in enumerate(NAMES)
        for moment in ("after", "before")
    ]
    before, after = ((folder / f"05_attention_to_dual_mode_{moment}.py").read_text() for moment in ("before", "after"))
    assert before.count("torch.ops.sparsespec.attention_site") == 2
    assert after.count("torch.ops.sparsespec.dual_mode_attention") == 2
    assert 'kv_pool: "f32[' in after
    regions = (folder / "08_split_into_regions_after.py").read_text()
    assert all(f"class region_{number}(torch.nn.Module)" in regions for number in range(3))
    for file in folder.iterdir():
        ast.parse(file.read_text())
