"""A page in the Chromium that PATH has, without a window: spoken to over its debugging pipe, which needs no client."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
DEADLINE_S = 60
# Chromium reads commands from descriptor 3 and answers on 4.
SHELL = 'exec "$0" "$@" 3<&{read} 4>&{write}'


def raised(descriptor: int) -> int:
    """Moved out of the way of those that Chromium wants."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


class Page:
    """A file as a screen of this width shows it. What goes wrong in it is kept in `errors`."""

    def __init__(self, path: Path, *, width: int, dark: bool, profile: Path):
        (commands, self.write), (self.read, answers) = os.pipe(), os.pipe()
        theirs = [raised(commands), raised(answers)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command = ["bash", "-c", SHELL.format(read=theirs[0], write=theirs[1]), str(BROWSER), *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)  # type: ignore[call-overload]
        for descriptor in theirs:
            os.close(descriptor)
        self.session, self.number, self.buffer = {}, 0, b""  # type: ignore[var-annotated]
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 560}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Page.navigate", url=path.as_uri())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.keep_error(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]  # type: ignore[no-any-return]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)  # type: ignore[no-any-return]

    def keep_error(self, event: dict[str, Any]) -> None:
        name, told = event.get("method"), event.get("params", {})
        is_call = name == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
        if is_call or name in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(told)[:500])

    def run(self, code: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, code: str) -> None:
        until = time.monotonic() + DEADLINE_S
        while not self.run(code):
            assert time.monotonic() < until, f"not within {DEADLINE_S} s: {code}"
            time.sleep(0.05)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        os.close(self.write)
        os.close(self.read)
