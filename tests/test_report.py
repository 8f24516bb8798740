"""The report and plots: what they hold for every kind of run, and that they are safe, small and offline."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from secateur.metrics_dsl.parser import parse
from secateur.results.archive.archive import Archive
from secateur.results.report.plot import PLOTS, write_plot
from secateur.results.report.report import write_report
from secateur.results.report.svg import axis, short
from secateur.results.summary.overview import Overview
from secateur.search.core.candidate import Candidate, Layer, Measurement, Trial
from support import FakeEvaluator, in_process

SECTIONS = {"verdict", "front", "ratios", "course", "parts", "front-table", "published", "card"}
LAYERS = [asdict(layer) for layer in FakeEvaluator.layers]
METRICS = ("abs(W)", "abs(W) * X", "square(W) * G", "(abs(W) / row_sum(W) + G) * X**0.5", "abs(W) * (X + G)")
TOML = """[search]
calibration = "/nowhere"
searcher = "gp"
space = "{space}"
metric = "wanda"
sparsity = {sparsity}
pattern = "unstructured"
group = "row"
objectives = {objectives}
budget = 20
seed = 7
stage = "model"
"""


class Page(HTMLParser):
    """What a browser would read: elements, texts, the data script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.ids, self.text, self.scripts = [], [], "", []
        self._inside = None
        self._open = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in ("meta", "link", "input"):
            self._open.append(tag)
        if tag in ("script", "style"):
            self._inside = tag

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text += data
        elif self._inside == "script":
            self.scripts.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def ratios(rng, sparsity, is_even):
    if is_even:
        return (sparsity,) * len(LAYERS)
    return tuple(np.clip(sparsity + rng.normal(0, 0.1, len(LAYERS)), 0, 0.95).round(6).tolist())


def make_run(folder, kind, count=24, has_holdout=True):
    """A run of one of three kinds, with measured, rejected, failed and alias rows and two baselines."""
    rng = np.random.default_rng(3)
    objectives = {"metric": ["kl", "size"], "ratios": ["kl"], "interval": ["kl", "density"]}[kind]
    trials = []
    for i in range(count):
        sparsity = float(rng.uniform(0.3, 0.75)) if kind == "interval" else 0.6
        text = f"{METRICS[i % 5]} + {i} * G" if kind == "metric" and i > 4 else METRICS[i % 5]
        metric = parse(text if kind == "metric" else "abs(W) * X")
        each = ratios(rng, sparsity, kind == "metric")
        candidate = Candidate(metric, each if kind == "metric" or i else (sparsity,) * len(LAYERS))
        values = {"sparsity": sparsity, "layer_error": float(rng.random())}
        if i % 4 == 2:
            trials.append(Trial(candidate, Measurement("screen", (), values, 0.1), "rejected"))
        elif i % 4 == 3 and kind == "metric":
            failed = Measurement("screen", failure="the scores of 3 layers are not finite")
            trials.append(Trial(candidate, failed, "failed"))
        else:
            kl = float(sparsity * (1 + rng.random()))
            values |= {"kl": kl, "perplexity": 10 + kl, "kl_rung": kl * 1.01}
            trials.append(
                Trial(candidate, Measurement("model", (), values, 1.0, "", str(i), 100), "measured")
            )
    first = trials[0]
    alias = Candidate(parse("2 * abs(W)"), first.candidate.ratios)
    trials.append(Trial(alias, first.measurement, "alias", first.candidate.key))
    with Archive(folder, write=True) as archive:
        names = ("magnitude", "wanda") if kind == "metric" else ("wanda", "wanda + owl")
        baselines = {t.candidate.key: n for t, n in zip(trials, names, strict=False)}
        archive.keep(
            objectives=objectives,
            pattern="unstructured",
            baselines=baselines,
            layers=LAYERS,
            versions={"torch": "2.13.0"},
            calibration="c0ffee",
            card={
                "model": "hub/some-model",
                "text": "/some/text.txt",
                "machine": "2 cores",
                "parts": {"statistics": {"sequences": 16, "length": 512, "sha256": "0" * 64}},
            },
        )
        archive.add(trials)
        if has_holdout:
            kls = [(t.candidate, t.measurement.values["kl"]) for t in trials if t.status == "measured"]
            held = [
                (c, Measurement("model", (), {"kl": kl * 1.1}, 1.0, parts=(kl, kl * 1.2))) for c, kl in kls
            ]
            archive.record(held, "holdout")
    sparsity = "[0.3, 0.75]" if kind == "interval" else "0.6"
    space = {"metric": "tree", "ratios": "layer", "interval": "curve"}[kind]
    (folder / "run.toml").write_text(
        TOML.format(space=space, sparsity=sparsity, objectives=json.dumps(objectives))
    )
    return folder


def report_of(folder, tmp_path):
    with Archive(folder) as archive:
        path = write_report(archive, tmp_path / "report.html")
    text = path.read_text()
    page = Page(text)
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids)), "an id is given once"
    assert len(text.encode()) < 1_000_000
    check_offline(text, page)
    return text, page


def check_offline(text, page):
    """Nothing is fetched: no address but those of name spaces, and a policy that forbids connections."""
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "action", "data", "poster", "srcset"):
                assert value.startswith(("#", "data:")), (name, key, value)
            assert key != "style" and not key.startswith("on"), "the policy would refuse it"  # noqa: PT018
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("kind", ["metric", "ratios", "interval"])
def test_a_report_holds_what_was_searched_found_and_spent(kind, tmp_path):
    folder = make_run(tmp_path / "run", kind)
    text, page = report_of(folder, tmp_path)
    with Archive(folder) as archive:
        front, rows = archive.front(), archive.frame()
        best = Overview(archive).best
    searched = {"metric": "metrics", "ratios": "layerwise ratios", "interval": "30\u00a0% to 75\u00a0%"}[kind]
    assert searched in page.text
    assert "hub/some-model" in page.text
    for key in front["key"]:
        assert key in page.text
    for name in rows["baseline"].dropna():
        assert name in page.text
    assert f"secateur export {folder} {rows.loc[best, 'key']} --to python -o metric.py" in page.text
    command = f"secateur prune hub/some-model --candidate {folder}:{rows.loc[best, 'key']} -o pruned"
    assert command in page.text  # on the text that the run was calibrated on
    assert r"\Vert X_{j} \Vert" in page.text  # the metric as LaTeX
    assert "c0ffee" in page.text
    assert "2.13.0" in page.text
    assert "rejected at screen" in page.text
    cells = [a for name, a in page.elements if name == "rect" and "fill-opacity" in a]
    assert len(cells) == len(LAYERS)
    data = page.data
    assert data["key"][data["selected"]] == rows.loc[best, "key"]
    assert {data["key"][i] for i in data["front"]} == set(front["key"])
    marks = [a["data-of"].split() for name, a in page.elements if name == "path" and a.get("data-of")]
    assert {int(i) for some in marks for i in some} <= set(range(len(data["key"])))
    assert ("Leaves and operators" in text) == (kind == "metric")
    assert ("not finite" in page.text) == (kind == "metric")
    assert "95 %" in page.text or kind == "interval"


def test_the_chart_of_several_objectives_switches_without_a_script(tmp_path):
    folder = make_run(tmp_path / "run", "metric")
    with Archive(folder, write=True) as archive:
        archive.keep(objectives=["kl", "size", "layer_error"])
    _, page = report_of(folder, tmp_path)
    switches = [a["id"] for name, a in page.elements if name == "input" and a.get("name") == "front-axis"]
    assert switches == ["front-axis-0", "front-axis-1"]


def test_an_empty_run_has_a_report_that_says_so(tmp_path):
    Archive(tmp_path / "run", write=True).close()
    _, page = report_of(tmp_path / "run", tmp_path)
    assert "Nothing has been measured yet" in page.text
    assert "what was searched is not known" in page.text
    assert page.data["selected"] is None


def test_a_run_that_only_screened_says_what_is_missing(tmp_path):
    candidates = [Candidate(parse(text), (0.5,) * 12) for text in METRICS]
    found = [Measurement("screen", (), {"layer_error": 0.1 * i, "sparsity": 0.5}) for i in range(5)]
    with Archive(tmp_path / "run", write=True) as archive:
        archive.keep(objectives=["kl", "size"])
        archive.add([Trial(c, m, "rejected") for c, m in zip(candidates, found, strict=True)])
    _, page = report_of(tmp_path / "run", tmp_path)
    assert "the run reached the stage screen" in page.text
    with Archive(tmp_path / "run", write=True) as archive:
        archive.keep(objectives=["layer_error", "size"])
        more = [Candidate(parse(f"{text} + X"), (0.5,) * 12) for text in METRICS]
        archive.add([Trial(c, m, "measured") for c, m in zip(more, found, strict=True)])
    _, page = report_of(tmp_path / "run", tmp_path)
    assert "layer error, relative" in page.text
    assert "does not name the layers" in page.text


def test_a_run_that_is_being_written_is_reported_as_far_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run", "ratios", has_holdout=False)
    with Archive(folder, write=True) as archive:
        archive._db.execute("BEGIN IMMEDIATE")
        archive._db.execute("DELETE FROM trials")
        _, page = report_of(folder, tmp_path)
        archive._db.execute("ROLLBACK")
    assert "24 of 20 candidates spent, no holdout figures yet" in page.text
    assert "No published rule has been measured on holdout tokens yet" in page.text


def test_text_of_a_run_never_becomes_code(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    folder = make_run(tmp_path / evil.replace("/", "\u2215"), "metric")
    with Archive(folder, write=True) as archive:
        key = archive.frame()["key"][0]
        baselines = archive.fact("baselines") | {key: evil}
        archive.keep(
            baselines=baselines, card={"model": evil, "text": evil, evil: {"a": evil}}, calibration=evil
        )
        layers = [x | {"name": f"{evil}{i}", "kind": f"{x['kind']}{evil}"} for i, x in enumerate(LAYERS)]
        archive.keep(layers=layers)
        failed = Candidate(parse("exp(W)"), (0.5,) * 12)
        archive.add([Trial(failed, Measurement("screen", failure=f"</table>{evil}"), "failed")])
    text, page = report_of(folder, tmp_path)
    assert sum(name == "script" for name, _ in page.elements) == 2
    assert not any(name == "img" for name, _ in page.elements)
    assert page.text.count("<script>alert(1)") > 5, "it is shown as text"
    assert "<script>alert" not in text


def test_a_hundred_thousand_candidates_stay_under_a_megabyte(tmp_path):
    rng = np.random.default_rng(0)
    long = [parse(f"(abs(W) / col_sum(abs(W)**1.{i:03}) + {i} * G) * X**0.5") for i in range(1, 900)]
    short_ = [parse(f"abs(W)**1.{i:03}") for i in range(1, 900)]  # which are written faster
    sparsities, kls = rng.uniform(0.3, 0.75, 100_000).tolist(), rng.exponential(1, 100_000).tolist()
    trials = []
    for i, (sparsity, kl) in enumerate(zip(sparsities, kls, strict=True)):
        values = {"sparsity": sparsity, "kl": sparsity * 3 + (kl if i % 28 else 0.0), "layer_error": kl}
        candidate = Candidate((short_ if i % 28 else long)[i % 899], (sparsity, sparsity))
        if i % 4:
            trials.append(Trial(candidate, Measurement("screen", (), {"layer_error": kl}, 0.1), "rejected"))
        else:
            trials.append(Trial(candidate, Measurement("model", (), values, 0.1, tokens=9), "measured"))
    with Archive(tmp_path / "run", write=True) as archive:
        layers = LAYERS[:2]
        archive.keep(objectives=["kl", "density"], layers=layers)
        archive.add(trials)
    begin = time.monotonic()
    text, page = report_of(tmp_path / "run", tmp_path)
    assert time.monotonic() - begin < 60  # seconds on a busy machine
    with Archive(tmp_path / "run") as archive:
        on_front = len(archive.front())
    assert on_front > 2000
    assert f"of {on_front:,} are listed" in text
    assert "points are left out of the picture, none of the front" in page.text


def test_the_command_replaces_an_older_file_and_leaves_nothing_beside_it(tmp_path):
    folder = make_run(tmp_path / "run", "metric")
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    with Archive(folder) as archive:
        write_report(archive, out)
    older = out.read_text().replace("hub/some-model", "an older model")
    out.write_text(older)
    done = in_process("report", folder, "-o", out)
    assert done.returncode == 0
    assert done.stderr == f"next: secateur export {folder} best --to json -o best.json\n"
    assert "kB, opens offline" in done.stdout
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert "an older model" not in out.read_text()
    assert list(out.parent.iterdir()) == [out]
    again = in_process("report", folder, "-o", out, "--json")
    assert json.loads(again.stdout)["bytes"] == out.stat().st_size


@pytest.mark.parametrize("command", ["report", "plot"])
def test_mistakes_are_one_sentence(command, tmp_path):
    folder, pipe = make_run(tmp_path / "run", "metric"), tmp_path / "pipe.svg"
    os.mkfifo(pipe)
    mistakes = {
        ("nothing", tmp_path / "a.svg"): "expected a run folder with an archive, got nothing",
        (folder, tmp_path): "expected a file",
        (folder, pipe): "which is none",
        (folder, folder / "run.toml" / "a.svg"): "cannot use",
    }
    for (run, out), message in mistakes.items():
        done = in_process(command, run, "-o", out)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize("run", ["metric", "ratios", "interval"])
def test_a_plot_is_the_same_valid_svg_every_time(kind, run, tmp_path):
    folder = make_run(tmp_path / "run", run)
    with Archive(folder) as archive:
        first = write_plot(archive, kind, tmp_path / "a.svg").read_bytes()
        second = write_plot(archive, kind, tmp_path / "b.svg").read_bytes()
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_plots_are_written_as_their_suffix_says(tmp_path):
    folder = make_run(tmp_path / "run", "metric")
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        assert in_process("plot", folder, "--kind", "history", "-o", tmp_path / name).returncode == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    wrong = in_process("plot", folder, "-o", tmp_path / "a.gif")
    assert "ends in .svg, .png, .pdf" in wrong.stderr
    wrong = in_process("plot", folder, "--kind", "fronts", "-o", tmp_path / "a.svg")
    assert "did you mean 'front'" in wrong.stderr
    Archive(tmp_path / "empty", write=True).close()
    wrong = in_process("plot", tmp_path / "empty", "-o", tmp_path / "a.svg")
    assert "to plot, got none" in wrong.stderr


def with_published_on_the_front(folder):
    """Name the first rule of the front as a published one, and one that is not there."""
    with Archive(folder, write=True) as archive:
        rows, front = archive.frame(), archive.front()
        off = rows[(rows["status"] == "measured") & ~rows["key"].isin(front["key"])]["key"].iloc[0]
        archive.keep(baselines={front["key"].iloc[0]: "wanda", off: "ria"})
    return folder


@pytest.mark.parametrize("kind", ["metric", "ratios", "interval"])
def test_legends_show_the_marks_of_their_pictures(kind, tmp_path):
    folder = with_published_on_the_front(make_run(tmp_path / "run", kind))
    text, _ = report_of(folder, tmp_path)
    figures = re.findall(r"<figure>(.*?)<figcaption>(.*?)</figcaption>", text)
    assert len(figures) >= 3
    for picture, caption in figures:
        marks = set(re.findall(r'class="((?:dots|line|level) [\w ]+)"', picture))
        keys = re.findall(r'<svg[^>]*class="chart key"[^>]*>(.*?)</svg>', caption)
        shown = [tuple(re.findall(r'class="([\w ]+)"', key)) for key in keys]
        assert {mark for key in shown for mark in key} == marks
        if kind != "ratios" and "dots front" in marks:
            assert ("line front", "dots front") in shown

    def look(line):
        return line.get_marker(), line.get_markerfacecolor(), line.get_linestyle(), line.get_color()

    with Archive(folder) as archive:
        axes = Figure().subplots()
        PLOTS["front"](Overview(archive), axes)
    drawn = {look(line) for line in axes.lines}
    assert {look(line) for line in axes.get_legend().findobj(Line2D)} == drawn
    assert len(drawn) == len(axes.lines)


def test_bars_of_holdout_figures_reach_as_far_as_student_says(tmp_path):
    folder = make_run(tmp_path / "run", "ratios")
    with Archive(folder, write=True) as archive:
        for key, parts in archive.holdout_parts().items():
            values = np.array([parts[0], parts[0] * 1.02])
            archive._db.execute("UPDATE measurements SET parts = ? WHERE key = ?", (values.tobytes(), key))
    text, _ = report_of(folder, tmp_path)
    table = re.search(r'<table class="intervals">.*?</table>', text)[0]
    figures = re.findall(r'class="number">([\d.]+)</td><td class="number soft">\S* ([\d.]+)<', table)
    bars = re.findall(r'd="M([\d.]+) 9H([\d.]+)M[^>]*></path><path d="M([\d.]+) 9h0"', table)
    values, errors = np.array(figures, dtype=float).T
    starts, ends, middles = np.array(bars, dtype=float).T
    assert len(values) == 3
    scale = (middles[2] - middles[0]) / (values[2] - values[0])
    assert (ends - starts) / 2 / scale == pytest.approx(12.7062 * errors, rel=0.02)  # of two sequences


def test_ratios_that_are_even_are_drawn_as_losing_neither_more_nor_less(tmp_path):
    folder = make_run(tmp_path / "run", "metric")
    with Archive(folder, write=True) as archive:  # what whole weights in a row come to
        archive._db.execute("""UPDATE trials SET "values" = json_set("values", '$.sparsity', 0.57)""")
    _, page = report_of(folder, tmp_path)
    cells = [a for name, a in page.elements if name == "rect" and "fill-opacity" in a]
    assert {(a.get("class"), a["fill-opacity"]) for a in cells} == {(None, "0.00")}
    assert page.data["ratios"][str(page.data["selected"])] == 600
    assert not page.data["middle"], "only uneven ratios have one"
    assert "every layer loses 60.0%" in page.text
    with Archive(folder) as archive:
        axes = Figure().subplots()
        PLOTS["ratios"](Overview(archive), axes)
    image = axes.images[0]
    assert np.allclose(image.norm(image.get_array()), 0.5)


def test_ratios_that_differ_are_drawn_beside_what_they_come_to_together(tmp_path):
    folder = make_run(tmp_path / "run", "ratios")
    _, page = report_of(folder, tmp_path)
    data = page.data
    packed, middle = data["ratios"][str(data["selected"])], data["middle"][str(data["selected"])]
    sizes = [layer["rows"] * layer["columns"] for layer in LAYERS]
    assert middle == pytest.approx(np.average(packed, weights=sizes), abs=1)
    cells = [a["class"] for name, a in page.elements if name == "rect" and "fill-opacity" in a]
    assert cells == ["more" if ratio > middle else "less" for ratio in packed]


@pytest.mark.parametrize(
    ("blocks", "ticks"), [(1, ["0"]), (2, ["0", "1"]), (30, ["0", "5", "10", "15", "20", "25"])]
)
def test_a_depth_axis_numbers_blocks_alone(blocks, ticks, tmp_path):
    layers = [asdict(Layer(f"{i}.q", i, "q_proj", 4, 4)) for i in range(blocks)]
    candidate = Candidate(parse("abs(W)"), tuple(0.5 + 0.01 * i for i in range(blocks)))
    found = Measurement("model", (), {"kl": 1.0, "sparsity": 0.5})
    with Archive(tmp_path / "run", write=True) as archive:
        archive.keep(objectives=["kl"], layers=layers)
        archive.add([Trial(candidate, found, "measured")])
        axes = Figure().subplots()
        PLOTS["ratios"](Overview(archive), axes)
        text = write_report(archive, tmp_path / "report.html").read_text()
    assert [label.get_text() for label in axes.get_xticklabels()] == ticks
    heat = re.search(r'<svg[^>]*class="heat.*?</svg>', text)[0]
    assert re.findall(r'class="middle">(\d+)</text>', heat) == ticks


def test_axes_have_round_ticks_and_hold_their_values():
    for values in ([0.9, 7.3], [1, 20], [1e-4, 5e3], [0.5], [], [-3, 4], [0.6, 0.6000001]):
        scale = axis("a", values)
        assert 2 <= len(scale.ticks()) <= 14
        assert all(scale.low <= v * (1 + 1e-9) and v <= scale.high * (1 + 1e-9) for v in scale.ticks())
        places = scale.place(values)
        assert ((places >= 0) & (places <= 1)).all()
    assert axis("a", [1, 20]).is_log
    assert not axis("a", [0, 20]).is_log
    assert [short(v) for v in (1234567, 20480, 0.25)] == ["1.235M", "20.48k", "0.25"]


def test_a_browser_shows_the_report_without_complaint(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine to open the report with")
    folder = make_run(tmp_path / "run", "ratios")
    report_of(folder, tmp_path)
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2400",
    )  # fmt: skip
    page = (tmp_path / "report.html").as_uri()
    picture = tmp_path / "report.png"
    for extra in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [chromium, *options, extra, page], capture_output=True, text=True, timeout=60, check=True
        )
        assert "CONSOLE" not in done.stderr, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert '<html lang="en" class="js">' in done.stdout, "the policy lets the page's own script run"
    assert done.stdout.count('class="selected"') == 1
    assert ">export</button>" in done.stdout
