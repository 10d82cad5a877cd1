"""The benchmark at a toy size, ours only: that it runs, adds up, draws, and leaves nobody behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import monotonic, sleep

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TOY_SHAPE = {"d-in": 16, "d-sae": 64, "k": 4, "batch": 64, "rows": 512, "threads": 1}
TOY = [word for name, value in TOY_SHAPE.items() for word in (f"--{name}", str(value))]
TOY += ["--peers", "none", "--cases", "main,encode,switch"]
STEPS, WARMUP = 5, 2


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.train_step", *TOY, *map(str, arguments)]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("benchmark") / "result.json"
    words = command("--steps", STEPS, "--warmup", WARMUP, "--json", file)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "apportion Mutual Choice" in done.stdout and "main:" in done.stderr
    return file


@pytest.fixture(scope="module")
def record(result_file: Path) -> dict:
    return json.loads(result_file.read_text())


def ours(result: dict) -> list[dict]:
    return [s for s in result["subjects"] if s["library"] == "apportion"]


def test_it_says_where_and_how_it_was_run(record):
    assert record["hardware"] and record["cores"] >= 1
    assert record["command"].startswith("python -m benchmarks.train_step --d-in 16")
    assert {"python", "torch", "apportion"} <= record["versions"].keys()


def test_every_subject_ran(record):
    main, encode, switch = record["results"]
    assert (main["case"], encode["case"], switch["case"]) == ("main", "encode", "switch")
    assert [s["name"] for s in main["subjects"]] == [
        "torch/product",
        "apportion/mutual_choice",
        "apportion/topk",
        "apportion/feature_choice",
        "apportion/mutual_choice/auto",
        "apportion/topk/auto",
        "apportion/feature_choice/auto",
    ]
    assert all(s["mode"] == "encode" for s in ours(encode))
    assert not main["skipped"]
    assert all("screen" in skipped["reason"] for skipped in encode["skipped"])
    assert not switch["skipped"]
    assert list(switch["comparisons"]) == [
        f"apportion Switch, {kind}-matched / apportion TopK" for kind in ("width", "FLOP")
    ]


def test_ratios_are_those_of_the_medians(record):
    for result in record["results"]:
        unit = median(result["subjects"][0]["seconds"])
        for subject in result["subjects"]:
            assert len(subject["seconds"]) == STEPS and min(subject["seconds"]) > 0
            assert subject["median_s"] == median(subject["seconds"])
            assert subject["ratio"] == pytest.approx(subject["median_s"] / unit)
            assert subject["tokens_per_s"] == pytest.approx(64 / subject["median_s"])
            assert subject["quartiles_s"][0] <= subject["median_s"] <= subject["quartiles_s"][1]


def test_comparisons_are_those_of_the_medians(record):
    main = record["results"][0]
    seconds = {s["label"]: s["median_s"] for s in main["subjects"]}
    assert "apportion TopK / apportion Mutual Choice" in main["comparisons"]
    for pair, times in main["comparisons"].items():
        a, b = pair.split(" / ")
        assert times == pytest.approx(seconds[a] / seconds[b])


def test_training_steps_train(record):
    for subject in ours(record["results"][0]):
        assert subject["fvu_after"] < subject["fvu_before"]
        assert subject["steps_done"] == STEPS + WARMUP
        assert subject["about"]["parameters"] == 2 * 16 * 64 + 16 + 64
        assert subject["peak_bytes"] > 0


def test_switch_saes_are_as_wide_as_the_topk_one_or_their_experts_are(record):
    topk, width, flop = (s["about"]["parameters"] for s in ours(record["results"][2]))
    router = {experts: experts * 16 + 16 for experts in (16, 8)}
    assert width == topk + router[16]
    assert flop == 8 * (topk - 16) + 16 + router[8]


def test_nothing_is_missed_without_a_screen(record):
    for subject in ours(record["results"][0]) + ours(record["results"][2]):
        assert subject["missed"]["missed"] == 0 and subject["missed"]["matches"] > 0


def test_encoding_does_not_train(record):
    for subject in ours(record["results"][1]):
        assert subject["fvu_after"] == subject["fvu_before"]


def test_charts(result_file, tmp_path):
    grown = json.loads(result_file.read_text())
    grown["results"] += [{**grown["results"][0], "case": "d_sae", "d_sae": d_sae} for d_sae in (64, 128)]
    file = tmp_path / "grown.json"
    file.write_text(json.dumps(grown))
    from benchmarks import plot

    assert plot.main([str(file), "--out", str(tmp_path / "charts")]) == 0
    assert {p.name for p in (tmp_path / "charts").iterdir()} == {"peers.png", "d_sae.png"}


@pytest.mark.parametrize("wrong", [["--cases", "mian"], ["--peers", "saelens"], ["--python", "peers=/nowhere/python"]])
def test_mistakes_are_answered_at_once(wrong, capsys):
    from benchmarks import train_step

    assert train_step.main([*TOY, *wrong]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_workers():
    endless = subprocess.Popen(command("--steps", 10**9), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(children(endless.pid)) >= 4)
        workers = children(endless.pid)
        endless.send_signal(signal.SIGINT)
        _, said = endless.communicate(timeout=60)
    finally:
        endless.kill()
    assert endless.returncode == 130 and "interrupted" in said
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def wait_for(fulfilled: Callable[[], bool], seconds: float = 60) -> None:
    until = monotonic() + seconds
    while not fulfilled():
        assert monotonic() < until, f"not fulfilled after {seconds} s"
        sleep(0.05)


def test_the_cost_of_a_start_is_given_in_steps(tmp_path):
    file = tmp_path / "start.json"
    words = ["--d-in", "32", "--d-sae", "64", "--k", "4", "--batch", "64", "--rounds", "2", "--saes", "topk,crosscoder"]
    words = [sys.executable, "-m", "benchmarks.start", *words, "--json", str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["hardware"] and list(record["saes"]) == ["topk", "crosscoder"]
    assert all(found[what] > 0 for found in record["saes"].values() for what in ("start", "step", "ratio"))
    assert done.stdout.count("ratio") == 2
