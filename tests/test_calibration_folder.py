"""Calibration folders that are damaged: whatever was changed is refused in a sentence, or changes nothing."""

import hashlib
import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from secateur.workers.calibrate.folder import PARTS, Calibration, CalibrationError
from secateur.workers.calibrate.manifest import write_manifest
from secateur.workers.measure.local_evaluator import LocalEvaluator

BLOCKS = range(3)


def everything(folder):
    """What a calibration folder gives to those who measure, as text and hashes."""
    found = Calibration(folder)
    tensors = [found.tokens(part, 260) for part in PARTS]
    for block in BLOCKS:
        for statistics in found.block(block).values():
            tensors += [statistics.gram, statistics.energy, *statistics.leaves.values()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    return digest, found.layers, found.entries, found.manifest


def refusal(folder):
    """The sentence by which a folder is refused; empty if it gives what it should."""
    try:
        everything(folder)
    except CalibrationError as error:
        says = str(error)
    else:
        return ""
    assert str(folder) in says
    assert re.search(r"calibrate again$|make one with", says)
    assert "\n" not in says
    return says


@pytest.fixture(scope="module")
def good(tiny_calibration):
    return everything(tiny_calibration.folder)


@pytest.fixture
def folder(tiny_calibration, tmp_path):
    return shutil.copytree(tiny_calibration.folder, tmp_path / "c")


@pytest.fixture
def older(folder):
    """The same in format 3, which had no hashes: what is wrong has to be found in tensors and fields."""
    change(
        folder, lambda manifest: [manifest.pop("files"), manifest.pop("sha256"), manifest.update(format=3)]
    )
    return folder


def change(folder, by):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    by(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(path, rng):
    content = bytearray(path.read_bytes())
    place = rng.randrange(min(len(content), rng.choice([8, 2000, len(content)])))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthened(path, rng):
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 20)))


def emptied(path, _rng):
    path.write_bytes(b"")


def zeroed(path, _rng):
    path.write_bytes(bytes(path.stat().st_size))


def removed(path, _rng):
    path.unlink()


def swapped(path, rng):
    other = rng.choice([p for p in files(path.parent) if p != path])
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def to_folder(path, _rng):
    path.unlink()
    path.mkdir()


def to_pipe(path, _rng):
    path.unlink()
    os.mkfifo(path)


def to_loop(path, _rng):
    path.unlink()
    path.symlink_to(path.name)


def to_device(path, _rng):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = (
    flipped,
    cut,
    lengthened,
    emptied,
    zeroed,
    removed,
    swapped,
    to_folder,
    to_pipe,
    to_loop,
    to_device,
)


@pytest.mark.parametrize("number", range(8))  # files of a calibration of three blocks
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_is_refused(damage, number, folder, good):
    paths = files(folder)
    assert len(paths) == 8
    damage(paths[number], random.Random(number))
    assert refusal(folder) or (damage in (flipped, lengthened) and everything(folder) == good)


@pytest.mark.parametrize("seed", range(60))
def test_whichever_bit_is_flipped(seed, folder, good):
    rng = random.Random(seed)
    path = rng.choice([p for p in files(folder) if p.suffix == ".safetensors"])
    flipped(path, rng)
    assert f"expected {path} as calibration wrote it, got other content of the same size" in refusal(folder)


@pytest.mark.parametrize("seed", range(60))
def test_an_older_folder_with_a_flipped_bit_never_ends_in_a_traceback(seed, older):
    rng = random.Random(seed)
    path = rng.choice([p for p in files(older) if p.suffix == ".safetensors"])
    content = bytearray(path.read_bytes())
    content[rng.randrange(3000)] ^= 1 << rng.randrange(8)  # the header above all
    path.write_bytes(content)
    refusal(older)


def test_a_manifest_that_was_edited_is_refused_and_one_laid_out_anew_is_not(folder, good):
    change(folder, lambda manifest: None)
    assert everything(folder) == good
    for by in (
        lambda m: m["layers"].reverse(), lambda m: m["model"].update(source="elsewhere"),
        lambda m: m.update(gradients=False), lambda m: m["layers"][0].update(evil=1),
        lambda m: m["files"].popitem(), lambda m: m["model"].update(trust_remote_code=True),
        lambda m: m["parts"].update(selection=m["parts"]["holdout"]), lambda m: m.update(sha256="0" * 64),
    ):  # fmt: skip
        before = (folder / "manifest.json").read_text(encoding="utf-8")
        change(folder, by)
        assert refusal(folder)
        (folder / "manifest.json").write_text(before, encoding="utf-8")
    assert everything(folder) == good


def test_older_folders_are_read_as_before(older, good):
    digest, layers, entries, _ = everything(older)
    assert (digest, layers, entries) == good[:3]


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (lambda m: m["layers"][0].update(rows=10**18), "at most 67,108,864, got 1000000000000000000"),
        (lambda m: m["layers"][0].update(columns=0), r"at least 1, got 0 at layers\[0\].columns"),
        (lambda m: m["layers"][0].update(block=10**9), "at most 1,048,576, got 1000000000"),
        (lambda m: m["layers"].append(m["layers"][0]), "expected each layer once, got"),
        (lambda m: m["layers"].reverse(), "layers in the order of their blocks"),
        (lambda m: m["layers"].clear(), "expected one layer or more"),
        (lambda m: m["layers"][0].update(tokens=3), "one shape for all layers that share an input"),
        (lambda m: m["layers"][6].update(gram=0), "one shape for all layers that share an input"),
        (lambda m: m["layers"][0].update(gram=10**6), "as gram1000000/X in .*, got none"),
        (lambda m: m["layers"][0].update(rows=64), r"\(64,\), 0 or more as .*/Y in .*, got F32 \(32,\)"),
        (lambda m: m["layers"][0].update(name="x"), "as x/Y in .*, got none"),
        (lambda m: m["parts"]["selection"].update(sequences=10**18), "at most 1,099,511,627,776"),
        (lambda m: m["parts"]["selection"].update(sequences=999), r"I32 \(999, 64\) as selection"),
        (lambda m: m["parts"].update(selection=m["parts"]["holdout"]), "the manifest names as selection"),
        (lambda m: m.update(versions=[]), "expected an object, got a list of 0 at versions"),
        (lambda m: m.pop("text"), "'text' is missing"),
        (lambda m: m.update(seed=-1), "at seed"),
        (lambda m: m["model"].update(stays_dense=[1]), r"at model.stays_dense\[0\]"),
        (lambda m: m.update(format=2), "q_proj/G in .*block-000.safetensors, got none"),
    ],
)  # fmt: skip
def test_what_a_manifest_says_is_checked_besides(by, says, older):
    change(older, by)
    assert re.search(says, refusal(older))


NAMES = ("H", "X", "M", "V", "D", "Y", "energy", "G")


def renamed(tensors, name):
    tensors["renamed"] = tensors.pop(name)


def fewer(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def another_type(tensors, name):
    tensors[name] = tensors[name].to(torch.float16 if tensors[name].is_floating_point() else torch.int64)


def first_is(value):
    def by(tensors, name):
        tensors[name].view(-1)[0] = value

    return by


@pytest.mark.parametrize(
    ("by", "names"),
    [
        *(
            (by, ("H", "X", "M", "V", "D", "Y", "energy", "G", "selection"))
            for by in (renamed, fewer, another_type)
        ),
        *((first_is(v), NAMES) for v in (float("nan"), float("inf"))),
        (first_is(-1.0), ("X", "V", "Y", "G")),
        *((first_is(v), ("selection",)) for v in (-5, 259, 2**31 - 1)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(by, names, older):
    for name in names:
        for path in files(older):
            before = path.read_bytes()
            tensors = load_file(path) if path.suffix == ".safetensors" else {}
            wanted = next((key for key in tensors if key.rpartition("/")[2] == name), None)
            if wanted is None or ("000" not in path.name and name != "selection"):
                continue
            by(tensors, wanted)
            save_file(tensors, path)
            assert str(path) in refusal(older)
            assert wanted in refusal(older)
            path.write_bytes(before)
    assert not refusal(older)


def test_token_ids_have_to_be_in_the_vocabulary(tiny_calibration):
    most = int(tiny_calibration.tokens("selection").max())
    assert torch.equal(tiny_calibration.tokens("selection", most + 1), tiny_calibration.tokens("selection"))
    with pytest.raises(CalibrationError, match=rf"to {most}, and a vocabulary of {most}; calibrate again"):
        tiny_calibration.tokens("selection", most)


def test_a_file_is_read_for_its_hash_once_and_again_when_it_changed(folder, monkeypatch):
    read = []
    hashed = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: [read.append(file.name), hashed(file, name)][1]
    )
    opened = Calibration(folder)
    assert [str(folder / "tokens.safetensors")] == read
    for _ in range(3):
        Calibration(folder).block(0)
    opened.block(1)
    assert len(read) == len(set(read)) == 5
    flipped(folder / "block-001.safetensors", random.Random(0))
    with pytest.raises(CalibrationError, match=r"block-001\.safetensors as calibration wrote it"):
        opened.block(1)
    assert len(read) == 6


class TestCopiesOfAModel:
    @pytest.fixture
    def with_copy(self, folder, tiny_model):
        """A folder with a dense copy of its model, as one of a quantised model has it."""
        before = Calibration(folder)
        shutil.copytree(tiny_model, folder / "model")
        (folder / "model" / "chat").mkdir()
        (folder / "model" / "chat" / "template.jinja").write_text("x", encoding="utf-8")
        (folder / "manifest.json").unlink()
        write_manifest(folder, before.manifest, before.layers, before.entries)
        return folder

    def test_the_model_is_loaded_from_it(self, with_copy):
        found = Calibration(with_copy)
        assert found.checked_model() == found.model_source == str(with_copy / "model")
        LocalEvaluator(found).close()

    def test_a_changed_file_of_it_is_refused_before_it_is_loaded(self, with_copy, tiny_model):
        flipped(with_copy / "model" / "model.safetensors", random.Random(1))
        found = Calibration(with_copy)  # has the sizes that it should have
        with pytest.raises(CalibrationError, match=r"model\.safetensors as calibration wrote it"):
            LocalEvaluator(found)
        LocalEvaluator(found, model=str(tiny_model)).close()

    @pytest.mark.parametrize("name", ["model.safetensors.index.json", "chat/more.py", "adapter/config.json"])
    def test_a_file_that_calibration_did_not_write_is_refused(self, with_copy, name):
        (with_copy / "model" / name).parent.mkdir(exist_ok=True)
        (with_copy / "model" / name).write_text("{}", encoding="utf-8")
        with pytest.raises(
            CalibrationError, match="expected only files that calibration wrote, which a model"
        ):
            Calibration(with_copy)

    def test_so_is_a_copy_where_calibration_made_none(self, folder):
        (folder / "model").mkdir()
        with pytest.raises(CalibrationError, match="expected only files that calibration wrote"):
            Calibration(folder)

    def test_a_missing_file_of_it_is_named(self, with_copy):
        (with_copy / "model" / "config.json").unlink()
        with pytest.raises(CalibrationError, match=r"incomplete: model/config\.json is missing"):
            Calibration(with_copy)
