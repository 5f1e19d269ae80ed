"""What is executed comes from where nobody else can write; what is read is data; nothing goes through a shell."""

from __future__ import annotations

import ast
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import stablekern
from stablekern import _build, _load, _nvrtc
from stablekern.eeg import corpus
from stablekern.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(ROOT / "stablekern").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").rglob("*.py"),
    ROOT / "setup.py", ROOT / "docs" / "hooks.py",
]  # fmt: skip
root_only = pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file to somebody else")


@pytest.fixture
def one_file(monkeypatch, tmp_path):
    """Sources that compile in a second; the cache is tmp_path/cache."""
    root = tmp_path / "csrc"
    (root / "include" / "stablekern").mkdir(parents=True)
    (root / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(_build, "PARTS", {"core": ("one.cpp",)})
    monkeypatch.setattr(_build, "source_root", lambda: root)
    return str(tmp_path / "cache")


def give_away(path: Path) -> None:
    os.chown(path, 12345, 12345)


def as_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


PLANTED = [
    pytest.param(lambda path: path.chmod(0o777), id="file-open"),
    pytest.param(lambda path: path.chmod(0o770), id="file-group"),
    pytest.param(lambda path: path.parent.chmod(0o777), id="folder-open"),
    pytest.param(as_link, id="file-link"),
    pytest.param(lambda path: as_link(path.parent), id="folder-link"),
    pytest.param(give_away, id="file-owner", marks=root_only),
    pytest.param(lambda path: give_away(path.parent), id="folder-owner", marks=root_only),
]


@pytest.mark.parametrize("spoil", PLANTED)
def test_a_library_that_others_could_write_is_built_again(one_file, spoil):
    library = _build.build(one_file, "x86-64")["core"]
    assert _build.find(one_file, "x86-64") == library
    spoil(library)
    assert _build.find(one_file, "x86-64") is None
    again = _build.build(one_file, "x86-64")["core"]
    assert again == library and _build.private(library) and not library.is_symlink()


def test_what_is_built_is_private_whatever_the_umask(one_file):
    before = os.umask(0)
    try:
        library = _build.build(one_file, "x86-64")["core"]
    finally:
        os.umask(before)
    for path in (Path(one_file), library.parent, library):
        assert path.stat().st_mode & 0o777 == 0o700, path


def test_a_cache_that_anybody_may_replace_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(BuildError, match=r"anybody may replace the cache directory .*: got 0o777"):
        _build.cache_directory(str(shared / "cache"))
    shared.chmod(0o1777)
    assert _build.cache_directory(str(shared / "cache")).stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_cache_that_anybody_may_replace_is_refused(tmp_path):
    shared = tmp_path / "shared"
    (shared / "cache").mkdir(parents=True, mode=0o700)
    shared.chmod(0o777)
    (tmp_path / "link").symlink_to(shared / "cache")
    with pytest.raises(BuildError, match="anybody may replace"):
        _build.cache_directory(str(tmp_path / "link"))


@pytest.mark.parametrize(
    "spoil", [p for p in PLANTED if p.id in ("file-open", "file-group", "file-link", "file-owner")]
)
def test_a_cuda_binary_that_others_could_write_is_compiled_again(tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("STABLEKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_nvrtc, "version", lambda: ("13.0", None))
    monkeypatch.setattr(_nvrtc, "_compile", lambda *_, **__: b"compiled")
    before = os.umask(0)
    try:
        assert _nvrtc.compiled("eigh.cu", "eigh_fwd_kernel", {"N": 3}, "sm_90") == b"compiled"
    finally:
        os.umask(before)
    (kept,) = (tmp_path / "cache").glob("cuda-*.bin")
    assert _build.private(kept)
    kept.write_bytes(b"planted")
    assert _nvrtc.compiled("eigh.cu", "eigh_fwd_kernel", {"N": 3}, "sm_90") == b"planted", "it is taken from the cache"
    spoil(kept)
    assert _nvrtc.compiled("eigh.cu", "eigh_fwd_kernel", {"N": 3}, "sm_90") == b"compiled"
    assert _build.private(kept) and kept.read_bytes() == b"compiled"


def triton_reason(monkeypatch, folder: Path) -> str | None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _load._triton_cache_reason.cache_clear()
    return _load.triton_reason("cpu")


def test_triton_is_not_used_with_a_cache_that_others_can_write(tmp_path, monkeypatch):
    folder = tmp_path / "triton"
    assert triton_reason(monkeypatch, folder) is None, "not there yet"
    folder.mkdir(mode=0o755)
    assert triton_reason(monkeypatch, folder) is None
    folder.chmod(0o1777)
    assert "anybody can write into Triton's cache" in triton_reason(monkeypatch, folder)
    folder.chmod(0o700)
    tmp_path.chmod(0o777)
    assert "anybody may replace Triton's cache" in triton_reason(monkeypatch, folder)
    tmp_path.chmod(0o700)
    _load._triton_cache_reason.cache_clear()
    with stablekern.use_backend("triton"):
        assert float(stablekern.focal_loss(torch.zeros(1), torch.ones(1))) > 0
        folder.chmod(0o777)
        _load._triton_cache_reason.cache_clear()
        with pytest.raises(stablekern.errors.BackendUnavailableError, match="anybody can write into Triton's cache"):
            stablekern.focal_loss(torch.zeros(1), torch.ones(1))
    _load._triton_cache_reason.cache_clear()


@root_only
def test_triton_is_not_used_with_a_cache_of_somebody_else(tmp_path, monkeypatch):
    folder = tmp_path / "triton"
    folder.mkdir()
    give_away(folder)
    assert "belongs to another user (12345)" in triton_reason(monkeypatch, folder)
    _load._triton_cache_reason.cache_clear()


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["STABLEKERN_TEST_BOMB"]),)


def bare(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


LOADERS = {
    "checkpoint": lambda path: stablekern.training.load_checkpoint(path),
    "bad batch": lambda path: stablekern.health.load_bad_batch(path),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))], ids=["torch", "bare"]
)
def test_nothing_is_unpickled(tmp_path, monkeypatch, load, save):
    mark = tmp_path / "exploded"
    monkeypatch.setenv("STABLEKERN_TEST_BOMB", str(mark))
    path = tmp_path / "file.pt"
    save({"format": 1, "model": Bomb()}, path)
    with pytest.raises(ValueError, match="stablekern"):
        load(path)
    assert not mark.exists()
    if save is torch.save:  # the bomb works
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_prepared_recordings_hold_no_objects(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEKERN_TEST_BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "signals.npy"
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(path)
    assert not (tmp_path / "exploded").exists()
    calls = [node for node in ast.walk(ast.parse(Path(corpus.__file__).read_text())) if isinstance(node, ast.Call)]
    assert not [node for node in calls for keyword in node.keywords if keyword.arg == "allow_pickle"]


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_shell_no_pickle_no_code_from_text(path):
    for name, node in called(ast.parse(path.read_text())):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"line {node.lineno}: {name}"
        assert name not in ("os.system", "os.popen", "subprocess.getoutput", "eval", "exec"), where
        assert not re.fullmatch(r"(pickle|marshal|dill|joblib|shelve|cPickle)\.(loads?|open|Unpickler)", name), where
        assert name not in ("tempfile.mktemp", "yaml.load"), where
        assert "shell" not in keywords, where
        assert "allow_pickle" not in keywords, where
        if name == "torch.load":
            assert isinstance(keywords.get("weights_only"), ast.Constant) and keywords["weights_only"].value is True, (
                where
            )
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"):
            assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), f"{where}: a list of words"


def test_a_compiler_with_shell_letters_in_its_path_is_only_a_path(one_file, tmp_path, monkeypatch):
    """CXX and the paths of the sources go through ninja, whose commands a shell reads."""
    mark = tmp_path / "exploded"
    folder = tmp_path / "a b; touch exploded; $(touch exploded)"
    folder.mkdir()
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {_build.compiler()} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.chdir(tmp_path)
    assert _build.build(one_file, "x86-64")["core"].is_file()
    assert not mark.exists() and not list(Path(one_file).rglob("exploded"))


def test_a_setting_with_shell_letters_is_only_a_word(one_file, tmp_path):
    with pytest.raises(BuildError):
        _build.build(one_file, "x86-64; touch exploded")
    assert not list(tmp_path.rglob("exploded"))
