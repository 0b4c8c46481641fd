# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve --part`: what does not go with a part of a model is refused before anything is opened."""

import pytest

from oarlock.cli.main import main


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--part", "2/2"], "part 2 of 2: give I/N"),
        (["--part", "half"], "'half' is no part: give I/N"),
        (["--part", "0/2", "--recall", "user:exact"], "no checkpoint in"),
        (["--part", "0/2", "--job", "."], "--job goes with all of a model"),
        (["--part", "1/2", "--http", "127.0.0.1:0"], "--http goes with all of a model"),
        (["--part", "1/2", "--recipe", "ncf"], "--recipe goes with all of a model"),
        (["--part", "1/2", "--predict-threads", "2"], "--predict-threads goes with all of a model"),
        # These go on, and find no checkpoint.
        (["--part", "1/2", "--recipe", "none"], "no checkpoint in"),
        (["--part", "0/1", "--http", "127.0.0.1:0"], "no checkpoint in"),
    ],
)
def test_what_goes_with_all_of_a_model_is_refused(tmp_path, capsys, options, words):
    assert main(["serve", str(tmp_path / "none"), *options]) == 1
    assert words in capsys.readouterr().err
