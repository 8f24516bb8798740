"""Rules taken to models: which go to any, on which text, and which of several is called the best."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import secateur
from exported import LAYERS, record
from safetensors.torch import load_file, save_file
from secateur.metrics_dsl.errors import SecateurError
from secateur.metrics_dsl.parser import parse
from secateur.results.archive.archive import Archive
from secateur.results.export.candidate_json import read_claim, read_json, to_json, write_json
from secateur.results.export.candidate_record import ExportError
from secateur.results.export.rule_source import RuleError, ratios_of, read_rule
from secateur.results.summary.compare import compare
from secateur.results.summary.overview import Overview
from secateur.results.summary.table import report, verdict
from secateur.results.terminal.watch import Watch
from secateur.search.core.candidate import Candidate, Measurement, Trial, uniform
from secateur.workers.calibrate.calibration import calibrate
from secateur.workers.calibrate.folder import token_hash
from support import in_process, save_model, small_request, tiny_config

UNEVEN = tuple(0.25 + 0.5 * i / (len(LAYERS) - 1) for i in range(len(LAYERS)))
SMALL = {"tokens": 128, "sequence_length": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tiny_calibration, tmp_path_factory):
    """A search on the tiny model; the tokens of its calibration are its own, not those of any default."""
    folder = tmp_path_factory.mktemp("rules") / "run"
    return secateur.run_search(tiny_calibration.folder, folder, sparsity=0.5, budget=11, device="cpu")


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    return save_model(tiny_config(num_hidden_layers=4), tmp_path_factory.mktemp("deeper") / "model")


def written(path, **facts):
    write_json(record("abs(W) * X", **facts), path)
    return path


def pruned(model, out, candidate, **options):
    return secateur.prune(model, out, candidate=str(candidate), device="cpu", **options)


class TestOneRatioForAllLayers:
    def test_stands_in_the_file_where_it_is_one(self):
        assert to_json(record("W", 0.6))["uniform"] == 0.6
        assert "uniform" not in to_json(record("W", UNEVEN))
        assert Candidate(parse("W"), ()).shared_ratio is None

    def test_is_a_claim_that_is_checked_and_that_older_files_do_not_make(self, tmp_path):
        path = written(tmp_path / "c.json", ratio=0.6)
        found, is_uniform = read_claim(path)
        assert is_uniform
        content = json.loads(path.read_text())
        older = {name: value for name, value in content.items() if name != "uniform"}
        path.write_text(json.dumps(older))
        assert read_claim(path) == (found, False)
        assert read_json(path) == found
        for claim in (0.5, True, "0.6", None, [0.6], 1.0, float("nan")):
            path.write_text(json.dumps(content | {"uniform": claim}))
            with pytest.raises(ExportError, match=r"at uniform in .*c\.json$"):
                read_claim(path)

    def test_goes_to_a_model_of_another_depth(self, run, deeper, text_file, tmp_path):
        run.export("wanda", to="json", out=tmp_path / "c.json")
        text = {"text": str(text_file), **SMALL}
        for number, candidate in enumerate((f"{run.folder}:wanda", tmp_path / "c.json")):
            found = secateur.prune(deeper, tmp_path / f"{number}", candidate=str(candidate), **text)
            assert [x["ratio"] for x in found["layers"]] == [0.5] * 28
            assert found["metric"] == "abs(W) * X"
            assert found["group"] == "row"

    def test_of_other_layers_is_no_claim_of_a_rule_for_some_of_them(self, deeper, text_file, tmp_path):
        path = written(tmp_path / "c.json")
        content = json.loads(path.read_text())
        del content["uniform"]
        path.write_text(json.dumps(content))
        with pytest.raises(RuleError, match="belongs to another model; --sparsity S takes its metric alone"):
            pruned(deeper, tmp_path / "out", path, text=str(text_file))

    def test_ratios_of_layers_of_other_shapes_go_to_no_model_with_these_names(self, tmp_path):
        wider = [replace(layer, rows=2 * layer.rows) for layer in LAYERS]
        path = written(tmp_path / "c.json", ratio=UNEVEN, layers=wider)
        with pytest.raises(RuleError, match=r"to have \(\d+, \d+\) weights, got .* belongs to another model"):
            ratios_of(read_rule(str(path)), LAYERS, str(path))
        assert ratios_of(read_rule(str(path)), wider, str(path)) == UNEVEN

    def test_a_pattern_beside_other_ratios_is_refused(self, tiny_model, text_file, tmp_path):
        path = written(tmp_path / "c.json", ratio=UNEVEN, pattern="2:4")
        with pytest.raises(RuleError, match=r"the ratio 0\.5 alone, which the pattern 2:4 .* got 0\.25 too"):
            pruned(tiny_model, tmp_path / "out", path, text=str(text_file))

    def test_is_of_whole_weights_in_every_row_of_any_layer(self):
        rule = replace(read_rule("wanda"), ratios=(0.6,), uniform=0.6)
        assert ratios_of(rule, LAYERS, "c.json") == (0.6,) * len(LAYERS)


class TestTheMetricAlone:
    @pytest.mark.parametrize("group", ["row", "layer"])
    def test_is_taken_by_a_sparsity_with_its_group(self, group, deeper, text_file, tmp_path):
        path = written(tmp_path / "c.json", ratio=UNEVEN, group=group)
        text = {"text": str(text_file), "tokens": 128, "sequence_length": 64}
        with pytest.raises(RuleError, match="--sparsity S takes its metric alone, which goes to any"):
            pruned(deeper, tmp_path / "out", path, **text)
        found = pruned(deeper, tmp_path / "out", path, sparsity=0.25, **text)
        assert {x["ratio"] for x in found["layers"]} == {0.25}
        assert (found["group"], found["candidate"], found["ratios"]) == (group, str(path), "uniform")

    def test_is_taken_of_a_key_too(self, run, deeper, text_file, tmp_path):
        found = pruned(
            deeper, tmp_path / "out", f"{run.folder}:best", sparsity=0.25, text=str(text_file), tokens=64
        )
        assert {x["ratio"] for x in found["layers"]} == {0.25}
        assert found["metric"] == run.best()["metric"]

    def test_is_taken_by_ratios_at_its_own_sparsity_where_it_has_one(self, deeper, text_file, tmp_path):
        even, uneven = written(tmp_path / "a.json", ratio=0.75), written(tmp_path / "b.json", ratio=UNEVEN)
        text = {"text": str(text_file), "tokens": 128, "sequence_length": 64, "ratios": "owl"}
        found = pruned(deeper, tmp_path / "out", even, **text)
        assert found["sparsity"] == pytest.approx(0.75, abs=0.02)
        assert len({x["ratio"] for x in found["layers"]}) > 1
        with pytest.raises(RuleError, match=r"expected a sparsity beside the ratios owl, .*give --sparsity$"):
            pruned(deeper, tmp_path / "no", uneven, **text)

    def test_of_a_pattern_keeps_it_and_its_sparsity(self, deeper, text_file, tmp_path):
        path = written(tmp_path / "c.json", pattern="2:4")
        text = {"text": str(text_file), "tokens": 128, "sequence_length": 64}
        for wrong in ({"sparsity": 0.6}, {"ratios": "owl"}):
            with pytest.raises(SecateurError, match="the pattern 2:4"):
                pruned(deeper, tmp_path / "no", path, **wrong, **text)
        for number, right in enumerate(({}, {"sparsity": 0.5}, {"ratios": "uniform"})):
            found = pruned(deeper, tmp_path / f"{number}", path, **right, **text)
            assert (found["pattern"], found["sparsity"]) == ("2:4", 0.5)


class TestTheTextOfARun:
    def test_is_taken_token_by_token(self, run, tiny_model, tiny_calibration, tmp_path):
        lines = []
        found = secateur.prune(
            tiny_model, tmp_path / "out", lines.append, candidate=f"{run.folder}:best", device="cpu"
        )
        part = tiny_calibration.manifest["parts"]["statistics"]
        assert found["text"] == {
            "source": tiny_calibration.manifest["text"], "sequences": 8, "sequence_length": 64, "seed": 0,
            "sha256": part["sha256"],
        }  # fmt: skip
        assert found["text"]["sha256"] == token_hash(tiny_calibration.tokens("statistics"))
        (line,) = [line for line in lines if "tokens" in line]
        assert line == (
            f"taking 8 sequences of 64 tokens from the run's calibration {tiny_calibration.folder}: of "
            f"{tiny_calibration.manifest['text']}"
        )

    def test_that_the_model_wrote_is_not_written_again(self, tiny_model, tmp_path):
        request = small_request(tiny_model, "self", tokens=128, seed=3)
        calibration = calibrate(request, tmp_path / "cal")
        run = secateur.run_search(calibration.folder, tmp_path / "run", budget=10, device="cpu")
        lines = []
        found = secateur.prune(
            tiny_model, tmp_path / "out", lines.append, candidate=f"{run.folder}:best", device="cpu"
        )
        assert found["text"]["sha256"] == calibration.manifest["parts"]["statistics"]["sha256"]
        assert (found["text"]["source"], found["text"]["seed"]) == ("self", 3)
        assert "read block by block" in lines  # which a model that writes is not

    def test_is_told_to_be_of_a_model_that_has_changed_since(self, text_file, tmp_path):
        model = save_model(tiny_config(), tmp_path / "model")
        calibration = calibrate(small_request(model, text_file), tmp_path / "cal")
        run = secateur.run_search(calibration.folder, tmp_path / "run", budget=10, device="cpu")
        said = []
        for number, change in enumerate((0, 1)):
            weights = load_file(model / "model.safetensors")
            weights["model.norm.weight"] += change
            save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
            candidate = f"{run.folder}:best"
            secateur.prune(model, tmp_path / f"{number}", said.append, candidate=candidate, device="cpu")
        (warning,) = [line for line in said if line.startswith("warning")]
        assert warning == (
            f"warning: {model} has other weights outside its blocks than when {run.folder} measured it"
        )

    def test_gives_way_to_what_is_said(self, run, tiny_model, text_file, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(text_file.read_text()[::-1])
        candidate = f"{run.folder}:best"
        found = pruned(tiny_model, tmp_path / "a", candidate, text=str(other))["text"]
        assert (found["source"], found["sequences"], found["sequence_length"]) == (str(other), 8, 64)
        found = pruned(tiny_model, tmp_path / "b", candidate, tokens=64, sequence_length=32, seed=5)["text"]
        assert (found["source"], found["sequences"]) == (str(text_file), 2)
        assert (found["sequence_length"], found["seed"]) == (32, 5)

    @pytest.mark.parametrize("how", ["gone", "another", "no settings"])
    def test_that_is_not_known_any_more_is_asked_for(self, how, run, tiny_model, text_file, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(run.folder, folder)
        settings = folder / "run.toml"
        if how == "no settings":
            settings.unlink()
        else:
            place = tmp_path / "cal"
            settings.write_text(settings.read_text().replace(str(run.settings.calibration), str(place)))
            if how == "another":
                calibrate(small_request(tiny_model, text_file, tokens=128), place)
        arguments = ("prune", tiny_model, "--candidate", f"{folder}:wanda", "--device", "cpu")
        done = in_process(*arguments, "--out", tmp_path / "out")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"the text that {folder} was calibrated on is not known" in line
        assert not (tmp_path / "out").exists()
        done = in_process(*arguments, "--text", text_file, "--tokens", 64, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr

    def test_is_read_again_for_another_model_and_a_change_is_told(self, deeper, text_file, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text(text_file.read_text())
        shallow = save_model(tiny_config(num_hidden_layers=1), tmp_path / "model")
        calibration = calibrate(small_request(shallow, text), tmp_path / "cal")
        run = secateur.run_search(calibration.folder, tmp_path / "run", budget=10, device="cpu")
        candidate, lines = f"{run.folder}:wanda", []

        def prune(name):
            del lines[:]
            return secateur.prune(deeper, tmp_path / name, lines.append, candidate=candidate, device="cpu")

        same = prune("same")["text"]["sha256"]  # both tokenizers know bytes
        assert same == calibration.manifest["parts"]["statistics"]["sha256"]
        assert not any(line.startswith("warning") for line in lines)
        text.write_text(text_file.read_text()[::-1])
        assert prune("changed")["text"]["sha256"] != same
        (warning,) = [line for line in lines if line.startswith("warning")]
        assert "other tokens than" in warning
        text.unlink()
        with pytest.raises(SecateurError, match=r"which .*cal was made from .*give --text FILE$"):
            prune("gone")


@pytest.fixture
def disagreeing(tmp_path):
    """A run whose published rules stand the other way round on holdout tokens than on selection tokens."""
    folder = tmp_path / "run"
    figures = {"abs(W) * X": (1.0, 2.0), "abs(W)": (1.5, 1.2), "W * V": (1.25, 1.6), "W * D * W": (3.0, 1.0)}
    names = {"abs(W) * X": "wanda", "abs(W)": "magnitude", "W * D * W": "sparsegpt"}

    def make(texts):
        shutil.rmtree(folder, ignore_errors=True)
        with Archive(folder, write=True) as archive:
            made = {text: uniform(parse(text), LAYERS, 0.5) for text in texts}
            archive.keep(
                objectives=["kl"], baselines={c.key: names[t] for t, c in made.items() if t in names},
                layers=[asdict(layer) for layer in LAYERS], pattern="unstructured", has_ended=True,
            )  # fmt: skip
            for text, candidate in made.items():
                kl, held = figures[text]
                found = Measurement("model", (), {"kl": kl, "sparsity": 0.5}, 1.0, tokens=10)
                archive.add([Trial(candidate, found, "measured")])
                parts = (held - 0.1, held + 0.1)
                archive.record([(candidate, Measurement("model", (), {"kl": held}, parts=parts))], "holdout")
        return folder

    return make, list(figures)


class TestTheBestPublishedRule:
    def test_is_the_same_one_everywhere(self, disagreeing):
        make, texts = disagreeing
        for some in (texts, [t for t in texts if t != "W * V"]):  # with a rule that was found, and without
            folder = make(some)
            with Archive(folder) as archive:
                sentence = verdict(archive.frame(), archive.front(), archive.holdout_parts())
                assert "wanda" in sentence
                assert "on selection tokens" in sentence
                view = Overview(archive)
                assert view.best_published["baseline"] == "wanda"
                assert archive.best()["baseline"] == archive.baselines().iloc[0]["baseline"] == "wanda"
                shown = report(archive)
                assert sentence in shown
                assert shown.index("magnitude") < shown.index("sparsegpt")
                assert compare([archive])["published"].tolist() == [2.0]
            assert read_rule(f"{folder}:best").metric == parse("abs(W) * X")
            assert Watch(folder).look().best[1]["baseline"] == "wanda"

    def test_of_an_interval_has_the_sparsity_of_what_was_found(self, tmp_path):
        with Archive(tmp_path, write=True) as archive:
            made = {}
            for text, sparsity, kl in (
                ("W", 0.25, 0.1), ("W * X", 0.5, 1.0), ("abs(W) * X", 0.5, 2.0), ("abs(W)", 0.75, 3.0),
                ("W * V", 0.75, 2.5),
            ):  # fmt: skip
                made[text] = uniform(parse(text), LAYERS, sparsity)
                values = {"kl": kl, "sparsity": sparsity}
                archive.add([Trial(made[text], Measurement("model", (), values), "measured")])
                held = Measurement("model", (), {"kl": kl}, parts=(kl - 0.1, kl + 0.1))
                archive.record([(made[text], held)], "holdout")
            names = {made["abs(W) * X"].key: "wanda", made["abs(W)"].key: "magnitude"}
            archive.keep(objectives=["kl", "density"], baselines=names, pattern="unstructured")
            sentence = verdict(archive.frame(), archive.front(), archive.holdout_parts())
        assert sentence.startswith("3 of the 3 rules on the front are not published ones")
        assert "`W * X`" in sentence
        assert (
            "wanda (both chosen on selection tokens at 50%), on holdout: KL 1.0000 against 2.0000" in sentence
        )

    def test_is_confirmed_on_holdout_and_not_chosen_there(self, disagreeing):
        make, _ = disagreeing
        folder = make(["abs(W)", "W * V", "W * D * W"])
        with Archive(folder) as archive:
            sentence = verdict(archive.frame(), archive.front(), archive.holdout_parts())
        assert "magnitude (both chosen on selection tokens), on holdout: KL 1.6000 against 1.2000" in sentence
