"""Where a place in the source lies."""

import os

from lightrft.sim import places


def test_a_real_path_is_that_of_the_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "module.py").write_text("")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "alias.py").symlink_to(os.__file__)
    for file in ("real/module.py", "folder/module.py", "folder/alias.py", "folder/../real/missing.py", "module.py"):
        for path in (file, str(tmp_path / file)):
            assert places._real_path(path) == os.path.realpath(path)


def test_a_relative_name_follows_the_working_directory(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("")
        monkeypatch.chdir(tmp_path / name)
        assert places._real_path("module.py") == str((tmp_path / name / "module.py").resolve())
