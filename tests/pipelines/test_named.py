"""Objects named in a text: a user's own file, or an installed module."""

import os
import pickle
import sys
import threading
from pathlib import Path

import pytest

from rsa_fast.pipelines.named import absolute_spec, load_module, load_object


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_executed_once_whatever_path_leads_to_it(tmp_path, monkeypatch):
    file = write(tmp_path / "my-views.py", "class Own:\n    count = 3\nCALLS = []\n")
    (tmp_path / "link.py").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    module = load_module(file)
    assert load_module("my-views.py") is load_module("./link.py") is load_module(str(file))
    assert load_module("my-views.py") is module
    assert sys.modules[module.__name__] is module
    assert load_object("my-views.py:Own") is module.Own


def test_the_same_file_name_in_two_folders_is_two_modules(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "own.py", f"WHERE = {folder!r}\n")
    assert load_object(f"{tmp_path}/one/own.py:WHERE") == "one"
    assert load_object(f"{tmp_path}/two/own.py:WHERE") == "two"


def test_objects_of_a_files_classes_pickle_and_a_forked_worker_finds_them(tmp_path):
    file = write(
        tmp_path / "own.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Own:\n    n: int\n",
    )
    one = load_object(f"{file}:Own")(4)
    data = pickle.dumps(one)
    assert pickle.loads(data) == one
    worker = os.fork()
    if worker == 0:
        os._exit(pickle.loads(data).n)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 4


def test_threads_that_load_a_file_at_once_get_the_same_whole_module(tmp_path):
    file = write(tmp_path / "slow.py", "import time\ntime.sleep(0.2)\nDONE = 1\n")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append((load_module(file), load_module(file).DONE)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(module) for module, _ in found}) == 1 and len(found) == 3


def test_an_installed_module_is_named_with_dots():
    assert load_object("os.path:join") is os.path.join
    assert absolute_spec("os.path:join") == "os.path:join"


def test_a_path_is_made_absolute_where_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("own.py:f") == f"{tmp_path.resolve()}/own.py:f"


def test_what_cannot_be_loaded_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.py", "def motion_blur(): ...\n")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "broken.py", "x = 1\n\ndef f(:\n    pass\n")
    write(tmp_path / "raises.py", "import json\n\njson.loads('no')\n")
    write(tmp_path / "imports.py", "\nimport nothing_of_this_name\n")
    write(tmp_path / "leaves.py", "raise SystemExit('bye')\n")
    (tmp_path / "notes.txt").write_text("hello")
    for spec, message in {
        "missing.py:f": r"there is no file .*/missing\.py",
        "./notes.txt:f": r"notes\.txt is not a Python file: its name must end in \.py",
        "own.py:motion_blurr": r"own\.py has no 'motion_blurr': it has motion_blur",
        "empty.py:f": r"empty\.py has no 'f': it has no public names",
        "broken.py:f": r"broken\.py cannot be loaded: SyntaxError: .*\(line 3\)",
        "raises.py:f": r"raises\.py cannot be loaded: JSONDecodeError: .*\(line 3\)",
        "imports.py:f": r"ModuleNotFoundError: No module named 'nothing_of.*\(line 2\)",
        "leaves.py:f": r"SystemExit: bye \(line 1\)",
        "own.py": r"'own\.py' has no name after a colon: wanted path/to/file\.py:name",
        "own.py:": r"nothing after the colon",
        "nothing_of_this_name:f": r"no module named 'nothing_of_this_name' is installed: for a fi",
        "~nobody_of_this_name/own.py:f": r"'~nobody_of_this_name/own\.py' is not a path to a file",
        f"{'long' * 200}.py:f": r"there is no file .*longlong\.py",
        "os.nothing:f": r"no module named 'os\.nothing' is installed",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_object(spec)
    assert load_object("own.py:motion_blur")  # a failed load leaves nothing behind
    assert not [name for name in sys.modules if name.startswith("file_raises")]
