"""Reports show what the records say, together with the conditions of every number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records, report
from benchmarks.sources import read_record
from griffin_vllm.errors import GriffinError

SETTINGS = {
    "benchmark": "speed",
    "date": "2026-01-02T03:04:05+00:00",
    "target": "target",
    "max_tokens": 512,
    "repeats": 3,
    "machine": {"cpu": "A <fast> CPU", "cores": 2, "memory_gib": 24, "load_average_before": [0.1, 0.1, 0.1]},
    "versions": {"vllm": "0.32.0"},
    "environment": {"LD_PRELOAD": "libiomp5.so"},
    "prompts": {"data": {"conversations": 20, "sha256": "0"}},
    "engine": {"dtype": "bfloat16", "compilation": "VLLM_COMPILE", "threads": 1},
    "engine_differences": {"griffin:small K=5": {"block_size": 16}},
}


def row(method: str, concurrency: int, **more: Any) -> dict[str, Any]:
    load = {"dataset": "data", "temperature": 0.0, "concurrency": concurrency, "num_prompts": 20}
    head = None if method == "none" else "heads/small"
    return {"method": method, "head": head, "num_speculative_tokens": 5, **load, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fast = {"speedup": 1.61, "speedup_ci": [1.5, 1.72], "tokens_per_second": 40.26}
    speed = [
        row("none", 1, speedup=1.0),
        row("none", 1, speedup=1.02),
        row("griffin", 1, **fast),
        row("griffin", 8, **fast | {"speedup": 0.9}),
    ]
    tau = {
        "acceptance_length": 2.345,
        "position_acceptance": [0.8, 0.545],
        "acceptance_length_by_turn": {"1": 2.25, "2": 2.5},
        "acceptance_length_by_context": {"1024": 2.75, "128": 2.0, "1048576": 1.0},
        "acceptance_length_by_repetition": {"loops": None, "varied": 2.125},
    }
    acceptance = [
        row("griffin", 8, **tau, conversations={"a": [30, 10], "b": [60, 20]}),
        row("eagle", 8, **tau, conversations={"a": [20, 10], "b": [40, 20]}),
    ]
    for name, rows in (("speed", speed), ("acceptance", acceptance)):
        record = {"settings": SETTINGS | {"benchmark": name}, "results": rows, "failures": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    training = tmp_path / "run"
    training.mkdir()
    lines = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "validation", "step": 1, "acceptance_length": 1.5},
    ]
    (training / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_tables_plots_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(folder / "speed.json"), str(folder / "acceptance.json")]
    more = ["--readme", str(folder / "README.md"), "--training", str(folder / "run")]
    assert report.main([*sources, "--out", str(folder / "out"), *more]) == 0
    printed = capsys.readouterr().out
    assert "| data (20) | griffin (small) | 5 | 0 | 8 |" in printed
    assert "1.61 [1.50, 1.72]" in printed
    for dataset in ("data", "all"):
        assert f"| {dataset} | griffin (small) | eagle (small) | 5 | 0 | 1.500 [1.500, 1.500] |" in printed
    groups = "turn 1 | turn 2 | context < 128 | context < 1024 | longer context | loops | varied"
    assert f"| data set | method | K | T | {groups} |" in printed
    assert "| data (20) | griffin (small) | 5 | 0 | 2.25 | 2.50 | 2.00 | 2.75 | 1.00 |  | 2.12 |" in printed
    assert "| 2.35 |" in printed or "| 2.34 |" in printed
    for condition in ("2026-01-02", "A <fast> CPU", "vllm 0.32.0", "bfloat16", "libiomp5.so", "3 repeats"):
        assert condition in printed
    assert "; 1 threads; engine of griffin:small K=5 differs: block_size 16;" in printed

    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert "| griffin (small) | 5 | 0 | 8 | 0.90 [1.50, 1.72] |" in readme
    assert "| none | 5 | 0 | 1 | 1.00 |" in readme
    assert "| none (again) | 5 | 0 | 1 | 1.02 |" in readme
    assert "| griffin (small) | 5 | 0 | 2.35 (-) |" in readme or "| 2.34 (-) |" in readme
    assert "| all | griffin (small) | eagle (small) |" in readme
    assert "| data | griffin (small) | eagle (small) |" not in readme
    plots = {path.stem for path in (folder / "out").glob("*.svg")}
    assert plots == {"acceptance-by-position", "speedup-by-method", "speedup-by-concurrency", "training"}
    assert all(f"(out/{name}.svg)" in readme for name in plots)

    page = (folder / "out" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "<th>context &lt; 128</th>" in page
    assert "A &lt;fast&gt; CPU" in page
    assert "<script" not in page


def test_headlines_are_in_the_readme_and_every_record_in_the_details(folder: Path) -> None:
    details = folder / "benchmarks" / "README.md"
    details.parent.mkdir()
    details.write_text((folder / "README.md").read_text())
    speed, acceptance, readme = (
        str(folder / name) for name in ("speed.json", "acceptance.json", "README.md")
    )
    files = ["--readme", readme, "--headlines", acceptance, "--details", str(details)]
    assert report.main([speed, acceptance, "--out", str(folder / "out"), *files]) == 0
    for title, in_readme in (("**Speed**", False), ("**Acceptance length**", True)):
        assert (title in Path(readme).read_text()) == in_readme
        assert title in details.read_text()
    # the plots are of the headlines, and each file names them from where it lies
    assert "(out/acceptance-by-position.svg)" in Path(readme).read_text()
    assert "(../out/acceptance-by-position.svg)" in details.read_text()
    assert "speedup-by-method.svg" not in details.read_text()


def test_margins_compare_heads_whose_drafts_are_sampled_alike() -> None:
    samplers = {
        "eagle": ("greedy", "probabilistic"),
        "griffin": ("greedy", "probabilistic"),
        "ngram": (None,),
    }
    rows = [
        {
            "method": method,
            "head": None,
            "dataset": "data",
            "num_speculative_tokens": 3,
            "temperature": 1.0,
            "concurrency": 1,
            "conversations": {"1": [2, 1]},
        }
        | ({"draft_sample_method": sampler} if sampler else {})
        for method, kinds in samplers.items()
        for sampler in kinds
    ]
    header, *lines = report.margins(report.ReadRecord({"benchmark": "acceptance"}, rows, "acceptance"))
    assert header[1:3] == ["method", "against"]
    assert sorted(line[1:3] for line in lines if line[0] == "all") == [
        ["griffin", "eagle"],
        ["griffin", "ngram"],
        ["griffin probabilistic", "eagle probabilistic"],
        ["griffin probabilistic", "ngram"],
    ]


def test_speed_margins_pool_data_sets_and_take_each_method_at_its_best_k() -> None:
    def measured(method: str, dataset: str, seconds: float, **more: Any) -> dict[str, Any]:
        samples = {
            "conversations": ["a", "b"],
            "loops": [False, True],
            "repeats": [0],
            "tokens": [[10, 30]],
            "seconds": [[seconds] * 2],
        }
        return row(method, 1, **more) | {"dataset": dataset, "samples": samples}

    rows = [
        measured("none", "x", 4.0, speedup=1.0),
        measured("none", "x", 5.0, speedup=0.8, speedup_ci=[0.7, 0.9]),
        measured("eagle", "x", 3.0, best_k=True),
        measured("eagle", "x", 1.0),
        measured("griffin", "x", 2.0, best_k=True),
        # the data sets of a run come in any order
        measured("griffin", "y", 1.0, best_k=True),
        measured("eagle", "y", 1.5, best_k=True),
        measured("none", "y", 2.0, speedup=1.0),
    ]
    expected = [
        ["griffin (small) K=5", "none", "0", "1", *["2.00 [2.00, 2.00]"] * 2],
        ["griffin (small) K=5", "eagle (small) K=5", "0", "1", *["1.50 [1.50, 1.50]"] * 2],
    ]
    header, *lines = report.speed_margins(report.ReadRecord({"benchmark": "speed"}, rows, "speed"))
    assert header[:2] == ["method", "against"]
    assert lines == expected
    # what failed on a data set is compared on the others, and a head of one folder name is another head
    more = [
        measured("eagle", "z", 9.0, best_k=True),
        measured("griffin", "x", 4.0, best_k=True, head="others/small"),
    ]
    lines = report.speed_margins(report.ReadRecord({"benchmark": "speed"}, rows + more, "speed"))[1:]
    assert [line for line in lines if line in expected] == expected
    assert ["griffin (small) K=5", "none", "0", "1", *["1.00 [1.00, 1.00]"] * 2] in lines
    # two GRIFFIN heads are compared once
    assert (
        lines.count(["griffin (small) K=5", "griffin (small) K=5", "0", "1", *["0.50 [0.50, 0.50]"] * 2]) == 1
    )
    assert len([line for line in lines if line[0] == line[1]]) == 1
    assert report.speed_margins(report.ReadRecord({"benchmark": "speed"}, rows[:2], "speed")) == []


def test_a_method_that_has_one_k_needs_no_best_one() -> None:
    samples = {"conversations": ["a"], "loops": [True], "repeats": [0], "tokens": [[10]]}
    rows = [
        row("none", 1, dataset="x", speedup=1.0) | {"samples": samples | {"seconds": [[4.0]]}},
        row("griffin", 1, dataset="x") | {"samples": samples | {"seconds": [[2.0]]}},
    ]
    source = report.ReadRecord({"benchmark": "speed"}, rows, "speed")
    # and no answer that does not loop gives no ratio of those
    assert report.speed_margins(source)[1:] == [
        ["griffin (small) K=5", "none", "0", "1", "2.00 [2.00, 2.00]", ""]
    ]
    two_ks = [*rows, rows[1] | {"num_speculative_tokens": 3}]
    assert report.speed_margins(source._replace(results=two_ks)) == []


def test_a_head_with_one_number_another_schedule_and_a_tuned_one_are_three_methods() -> None:
    samples = {"conversations": ["a"], "loops": [False], "repeats": [0], "tokens": [[10]]}
    speeds: list[tuple[str, float, dict[str, Any]]] = [
        ("none", 4.0, {"speedup": 1.0}),
        ("griffin", 8.0, {}),
        ("griffin", 4.0, {"schedule": [], "untuned": True}),
        ("griffin", 2.0, {"schedule": []}),
    ]
    rows = [
        row(method, 8, dataset="x", **more) | {"samples": samples | {"seconds": [[seconds]]}}
        for method, seconds, more in speeds
    ]
    assert [report.drafts(one) for one in rows[1:]] == ["5", "untuned", "tuned"]
    lines = report.speed_margins(report.ReadRecord({"benchmark": "speed"}, rows, "speed"))[1:]
    one, untuned, tuned = ("griffin (small) K=5", "griffin (small) untuned", "griffin (small) tuned")
    ratios = {(line[0], line[1]): float(line[4].split()[0]) for line in lines}
    assert ratios == {
        (one, "none"): 0.5,
        (untuned, "none"): 1.0,
        (untuned, one): 2.0,
        (tuned, "none"): 2.0,
        (tuned, one): 4.0,
        (tuned, untuned): 2.0,
    }


def test_intervals_of_a_data_set_need_conversations_enough_to_draw_from() -> None:
    measured = row("griffin", 1, speedup=1.5, speedup_ci=[1.0, 2.0])
    for conversations, text in ((2, "1.50"), (5, "1.50 [1.00, 2.00]")):
        assert report.COLUMNS["speedup"](measured | {"num_prompts": conversations}) == text
    free = {"speedup_loop_free": 1.2, "speedup_loop_free_ci": [1.1, 1.3], "num_prompts": 20}
    for loops, text in ((16, "1.20"), (15, "1.20 [1.10, 1.30]")):
        samples = {"loops": [True] * loops + [False] * (20 - loops)}
        assert report.COLUMNS["without loops"](measured | free | {"samples": samples}) == text


def test_methods_without_a_head_are_compared_with_across_records_of_the_same_prompts(folder: Path) -> None:
    acceptance = json.loads((folder / "acceptance.json").read_text())
    suffix = row("suffix", 8, head=None, acceptance_length=2.0, conversations={"a": [10, 10], "b": [20, 20]})
    settings = acceptance["settings"]
    for name, asked, expected in (
        ("same", {}, {"eagle (small)", "suffix"}),
        ("other", {"prompts": {"data": {"conversations": 20, "sha256": "1"}}}, {"eagle (small)"}),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(acceptance | {"settings": settings | asked, "results": [suffix]}))
        source, _ = report.read_records([folder / "acceptance.json", path])
        assert {line[2] for line in report.margins(source)[1:]} == expected
        assert source.results == acceptance["results"]


def test_a_record_says_that_its_run_was_cut_short_and_how_often_each_row_was_measured() -> None:
    rows = [row("none", 1, repeats=3), row("griffin", 1, repeats=2)]
    settings = SETTINGS | {"finished": False}
    assert "; 2 repeats; unfinished" in report.conditions(report.ReadRecord(settings, rows, "speed"))
    assert "unfinished" not in report.conditions(report.ReadRecord(SETTINGS, rows, "speed"))


def test_two_heads_of_one_folder_name_have_a_margin_each() -> None:
    tau = {"num_speculative_tokens": 3, "temperature": 0.0, "concurrency": 1, "dataset": "data"}
    rows = [
        {"method": method, "head": head, **tau, "conversations": {"1": [tokens, 1]}}
        for method, head, tokens in (("eagle", "e", 2), ("griffin", "a/small", 3), ("griffin", "b/small", 4))
    ]
    lines = report.margins(report.ReadRecord({"benchmark": "acceptance"}, rows, "acceptance"))[1:]
    ratios = [line[-1].split()[0] for line in lines if line[0] == "all"]
    assert ratios == ["1.500", "2.000"]


def test_a_plot_joins_no_two_records(folder: Path) -> None:
    speed = read_record(folder / "speed.json")
    served = speed._replace(name="served")
    for sources, ends in (([speed], {"T=0"}), ([speed, served], {", speed", ", served"})):
        figure = report.plots(sources, [])["speedup-by-concurrency"]
        labels = [str(line.get_label()) for line in figure.axes[0].get_lines()]
        drafted = [label for label in labels if label.startswith("griffin")]
        assert len(drafted) == len(ends)
        assert all(any(label.endswith(end) for label in drafted) for end in ends)


def test_lists_of_numbers_take_one_line_and_strings_stay_as_they_are() -> None:
    whole = {"a": [1, 2], "b": [[0.5], []], "c": ["x,y", "[\n,  1]"], "d": [{"e": None}]}
    text = records.indented(whole)
    assert json.loads(text) == whole
    assert ' "a": [1, 2],\n' in text


def test_the_same_records_give_the_same_files(folder: Path) -> None:
    files = []
    for name in ("a", "b"):
        report.main([str(folder / "speed.json"), "--out", str(folder / name)])
        files.append({path.name: path.read_bytes() for path in (folder / name).iterdir()})
    assert files[0] == files[1]


def test_a_file_that_is_no_record_is_refused(folder: Path) -> None:
    path = folder / "other.json"
    path.write_text("{}")
    with pytest.raises(GriffinError, match="is not a record"):
        report.main([str(path), "--out", str(folder / "out")])


def test_a_readme_without_markers_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("text")
    arguments = [
        str(folder / "speed.json"),
        "--out",
        str(folder / "out"),
        "--readme",
        str(folder / "README.md"),
    ]
    with pytest.raises(GriffinError, match="needs the lines"):
        report.main(arguments)
