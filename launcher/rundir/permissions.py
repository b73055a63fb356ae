"""Who else may write a run, or read the key it logs with. Looked at before anything is started."""

import os
import shlex
import stat
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.rundir.exits import RunStateError
from launcher.rundir.paths import RunDir

KEY = "WANDB_API_KEY"
MAX_KEY_BYTES = 4096


def refuse_world_writable(run: RunDir) -> None:
    """RunStateError where everybody may write the run, its config, or the folder it stands in. That folder may have the sticky
    bit, as /tmp has. What does not exist is let through."""
    for path in (run.root.parent, run.root, run.lock, run.config):
        mode = mode_of(path)
        if not mode & stat.S_IWOTH or (path == run.root.parent and mode & stat.S_ISVTX):
            continue
        found = f"{path} may be written by everybody (mode {stat.S_IMODE(mode):04o})"
        rule = "what jobs and ranks read there they run as you"
        whole = " -R" if path == run.root else ""
        fix = f"`chmod o-w{whole} {shlex.quote(str(path))}`, and `umask 022` before phidias if it was made without one"
        raise RunStateError(f"{found}; {rule}. Fix: {fix}")


def mode_of(path: Path) -> int:
    """0 where there is nothing to look at."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def check_key_file(config: RunConfig) -> None:
    """ConfigError where ranks would need monitor.wandb.key_file and it does not hold a key that nobody else can read."""
    if (file := needed_key_file(config)) is not None:
        read_key(file)


def lend_key(config: RunConfig) -> None:
    """Puts the key into this process's environment, where wandb looks for it, and nowhere else. RunStateError where the file is
    no longer as it was at launch."""
    if (file := needed_key_file(config)) is None:
        return
    try:
        os.environ[KEY] = read_key(file)
    except ConfigError as error:
        raise RunStateError(str(error)) from None


def needed_key_file(config: RunConfig) -> str | None:
    wandb = config.monitor.wandb
    return wandb.key_file if wandb.mode == "online" and not os.environ.get(KEY) else None


def read_key(file: str) -> str:
    """The one line of the file. It is opened first: what is judged is what is read."""
    try:
        descriptor = os.open(Path(file).expanduser(), os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    except OSError as error:
        raise refusal(file, found=f"({error.strerror})", fix=f"a file of yours with mode 0600, or export {KEY}") from None
    try:
        refuse_open_to_others(file, status=os.fstat(descriptor))
        content = os.read(descriptor, MAX_KEY_BYTES)
    finally:
        os.close(descriptor)
    words = content.decode(errors="replace").split()
    if len(words) != 1 or not words[0].isprintable():
        raise refusal(file, found="with something else than one key", fix="the key alone, on one line")
    return words[0]


def refuse_open_to_others(file: str, *, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise refusal(file, found="which is no regular file", fix="the path of a file")
    if status.st_uid not in (os.geteuid(), 0):
        raise refusal(file, found=f"which belongs to user {status.st_uid}", fix="a copy of your own with mode 0600")
    if mode & 0o077:
        fix = f"`chmod 600 {shlex.quote(file)}`, and a new key where others may have read this one"
        raise refusal(file, found=f"with mode {mode:04o}", fix=fix)


def refusal(file: str, *, found: str, fix: str) -> ConfigError:
    rule = "the key is one line of a regular file that is yours and that nobody else may read"
    return ConfigError(Problem("monitor.wandb.key_file", f"{file} {found}", rule, fix))
