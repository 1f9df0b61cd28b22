"""Replies from vLLM, which is started for the model and stopped after it.

Every process starts `vllm serve` for its own GPUs, so the processes divide the prompts as they do
without it. It is a program of an environment of its own: it pins its own torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cpt_merge.core.distributed import Ranks, wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.core.parent import end_with_parent
from cpt_merge.core.progress import timed
from cpt_merge.evaluation.generate.config import ServerConfig, VllmConfig
from cpt_merge.evaluation.generate.endpoint import EndpointError
from cpt_merge.evaluation.generate.server import MODELS, Served, ServerEngine
from cpt_merge.evaluation.gpus import Gpus
from cpt_merge.evaluation.models import LanguageModel

LOOPBACK = "127.0.0.1"
OF_THIS_JOB = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # torch's
PATIENCE = 5.0  # seconds for one look at whether it is ready
GRACE = 30.0  # seconds to end by itself
SHOWN_LINES = 3  # of its log, if it fails


class VllmEngine(ServerEngine):
    """Starts vLLM on this process's GPUs."""

    def __init__(
        self,
        model: LanguageModel,
        ranks: Ranks,
        server: ServerConfig,
        config: VllmConfig,
        directory: Path,
        gpus: Gpus,
        setting: str,
    ) -> None:
        self._port = _free_port()
        url = f"http://{LOOPBACK}:{self._port}/v1"
        super().__init__(model, ranks, server, url, directory, setting)
        self._vllm, self._gpus = config, gpus
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.gettempdir()) / f"cpt-merge-vllm-{os.getpid()}-{model.name}.log"

    def close(self) -> None:
        """See `Engine.close`."""
        process, self._process, self._served = self._process, None, None
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which may outlive it
        process.wait()

    def _find(self) -> Served:
        with timed(f"{self.model.name}: starting {' '.join(self._vllm.command)}, log {self._log}"):
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._vllm.command, str(self._directory), *self._arguments()],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(),
                    start_new_session=True, preexec_fn=end_with_parent,
                )  # fmt: skip
            ready = wait_for(
                self._is_ready, "vLLM to load the model", check=self._check_running,
                timeout=self._vllm.start_timeout,
            )  # fmt: skip
        if not ready:
            raise UserError(
                f"vLLM was not ready after {self._vllm.start_timeout:.0f} s; see {self._log}, or "
                "raise evaluation.vllm.start_timeout."
            )
        return super()._find()

    def _with_advice(self, error: EndpointError) -> str:
        if error.misconfigured:
            return super()._with_advice(error)
        return f"{error}; vLLM's log is {self._log}."

    def _arguments(self) -> list[str]:
        # sampling settings in generation_config.json would apply to what a request leaves out
        settings = [
            "--host", LOOPBACK, "--port", str(self._port), "--served-model-name", self._name,
            "--generation-config", "vllm",
        ]  # fmt: skip
        if self._gpus.count > 1:
            settings += ["--tensor-parallel-size", str(self._gpus.count)]
        return [*settings, *self._vllm.arguments]

    def _environment(self) -> dict[str, str]:
        """Ours without what concerns the processes of this job, and with its share of the GPUs."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_THIS_JOB}
        if self._gpus.count:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            visible = listed.split(",") if listed else None
            mine = [visible[one] if visible else str(one) for one in self._gpus.numbers]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment

    def _is_ready(self) -> bool:
        try:
            replace(self._endpoint, attempts=1, timeout=PATIENCE).get(MODELS)
        except EndpointError as error:
            if error.misconfigured:  # it is ready, and wants another key
                raise
            return False
        return True

    @property
    def _name(self) -> str:
        return self._config.names.get(self.model.name, self.model.name)

    def _check_running(self) -> None:
        assert self._process is not None, "started"
        code = self._process.poll()
        if code is None:
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = " | ".join(line.strip() for line in lines[-SHOWN_LINES:]) or "it wrote nothing"
        raise UserError(f"vLLM ended with exit code {code} ({last}); its log is {self._log}.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
