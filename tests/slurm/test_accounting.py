"""What Slurm says of jobs that have ended: nothing where no accounts are kept, all of it where slurmdbd keeps them."""

import json
import os
import pwd
import shutil
import subprocess
import time

import pytest

from launcher.rundir.paths import RunDir
from launcher.rundir.records import append_record
from tests.slurm.conftest import require
from tests.slurm.daemons import PATH, free_ports, missing_programs
from tests.slurm.lab import SlurmLab

DATABASE = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr")
INSTALL = "apt-get install -y --no-install-recommends mariadb-server slurmdbd"
NO_ACCOUNTS = "AccountingStorageType=accounting_storage/none"
ACCOUNTS = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.sock"""
SLURMDBD_CONF = """AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser={user}
StorageLoc=lab
"""
# Anyone on this machine may read and write it: it holds three jobs, for two minutes.
MARIADB = ("--no-defaults", "--skip-grant-tables", "--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=0")
TIME_LIMIT_S = 150.0  # of a minute, which Slurm looks at every half
ACCOUNTED_S = 30.0


class AccountedLab(SlurmLab):
    """A cluster with a slurmdbd and its database, in the same folder."""

    def _configuration(self):
        self._dbd_port, self._database_port = free_ports(2)
        return super()._configuration().replace(NO_ACCOUNTS, ACCOUNTS.format(port=self._dbd_port, folder=self.folder))

    def _start_controller(self):
        """It asks slurmdbd for its cluster at once."""
        self._start_database()
        user = pwd.getpwuid(os.getuid()).pw_name
        values = dict(
            folder=self.folder, host=os.uname().nodename, port=self._dbd_port, database=self._database_port, user=user
        )
        file = self.folder / "slurmdbd.conf"
        file.touch(mode=0o600)
        file.write_text(SLURMDBD_CONF.format(**values))
        self._start("slurmdbd", "slurmdbd", "-D")
        self.until(lambda: self._says("sacctmgr", "--immediate", "add", "cluster", "lab") is not None, what="slurmdbd")
        super()._start_controller()

    def _start_database(self):
        data, socket = f"--datadir={self.folder}/data", f"--socket={self.folder}/mariadb.sock"
        user = ["--user=root"] if os.getuid() == 0 else []
        made = [
            "mariadb-install-db",
            "--no-defaults",
            data,
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
            *user,
        ]
        subprocess.run(made, env=self.env, check=True, capture_output=True)
        self._start("mariadbd", "mariadbd", *MARIADB, data, socket, f"--port={self._database_port}", *user)
        self.until((self.folder / "mariadb.sock").exists, what="mariadbd")


@pytest.fixture(scope="module")
def accounted():
    if not os.environ.get("PHIDIAS_SLOW"):
        pytest.skip("a time limit takes a minute and a half: PHIDIAS_SLOW=1, or make test-slow")
    require(missing_programs())
    if missing := [name for name in DATABASE if not shutil.which(name, path=PATH)]:
        pytest.skip(f"no {', '.join(missing)} on this machine: {INSTALL}")
    with AccountedLab(nodes=2) as lab:
        yield lab


def make_run(root, *, jobs):
    run = RunDir(root / "runs" / "some")
    run.root.mkdir(parents=True)
    run.config.touch()
    for job in jobs:
        append_record(run.events, "submitted", stage="pretrain", job=job)
    return run


def status(lab, root, *words):
    path = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    return lab.run("env", path, "phidias", "status", *words, f"runs_dir={root / 'runs'}", cwd=root)


def submit(lab, command, *options):
    return lab.submit(["sbatch", *options, f"--wrap={command}"])


def test_without_accounts_the_queue_is_told(slurm, tmp_path):
    """squeue keeps what has ended for itself, and sacct fails: nothing of that is seen."""
    ended = submit(slurm, "exit 3")
    slurm.wait(ended, "FAILED")
    working = submit(slurm, "sleep 60")
    slurm.wait(working, "RUNNING")
    waiting = submit(slurm, "true", f"--dependency=afterok:{working}")
    make_run(tmp_path, jobs=[ended, working, waiting])
    (row,) = json.loads(status(slurm, tmp_path, "out=json"))
    assert row["jobs"] == [
        {"job": working, "state": "RUNNING"},
        {"job": waiting, "state": "PENDING", "reason": "Dependency"},
    ]
    assert row["ended_jobs"] == []
    assert f"some: waiting {waiting} (Dependency)\n" in status(slurm, tmp_path)


def test_accounts_tell_how_jobs_ended(accounted, tmp_path):
    """A job that failed, one whose node died and one that ran out of time: the run directory knows of none."""
    late = submit(accounted, "sleep 600", "--time=1", "--nodelist=" + accounted.nodes[0])
    failed = submit(accounted, "exit 3")
    killed = submit(accounted, "sleep 600", "--no-requeue", "--nodelist=" + accounted.nodes[1])
    accounted.wait(failed, "FAILED")
    accounted.wait(killed, "RUNNING")
    accounted.kill_node(accounted.nodes[1])
    accounted.wait(killed, "NODE_FAIL")
    accounted.wait(late, "TIMEOUT", timeout=TIME_LIMIT_S)
    make_run(tmp_path, jobs=[late, failed, killed])
    ended = accounts_of(accounted, tmp_path)
    assert {job: (row["state"], row["exit_code"]) for job, row in ended.items()} == {
        failed: ("FAILED", "3:0"),
        killed: ("NODE_FAIL", "0:0"),
        late: ("TIMEOUT", "0:0"),
    }
    assert ended[late]["elapsed_s"] >= 60 and ended[killed]["nodes"] == accounted.nodes[1]
    assert "TIMEOUT 0:0 after 1 min" in status(accounted, tmp_path, "some")


def accounts_of(lab, root):
    """slurmdbd is told a little after the job has ended."""
    deadline = time.monotonic() + ACCOUNTED_S
    while True:
        (row,) = json.loads(status(lab, root, "out=json"))
        ended = {job["job"]: job for job in row["ended_jobs"]}
        if len(ended) == 3 or time.monotonic() > deadline:
            return ended
        time.sleep(0.5)
