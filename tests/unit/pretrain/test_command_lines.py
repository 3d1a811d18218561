"""A wrong command line of `pretrain` is one line on stderr and exit code 2."""

from collections.abc import Callable

import pytest

from pretrain import outcome, status, train

Main = Callable[[list[str]], object]


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train.main, [], "error: the following arguments are required: CONFIG.toml"),
        (train.main, ["x.toml", "--dryrun"], "error: unrecognized arguments: --dryrun"),
        (train.main, ["x.toml", "--world-size", "0"], "error: --world-size: 0 is not a whole"),
        (train.main, ["x.toml", "--world-size", "two"], "error: --world-size: two is not a whole"),
        (status.main, ["run", "--watch", "-1"], "error: --watch: -1 is not above 0"),
        (status.main, ["run", "--watch", "nan"], "error: --watch: nan is not a number"),
        (outcome.main, ["--directory"], "error: the following arguments are required"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    main: Main, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.startswith(words)
    assert line.count("\n") == 1
