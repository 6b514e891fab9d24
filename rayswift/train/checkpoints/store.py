"""How checkpoints get to the run directory and back, from inside the workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from rayswift.data.files import filesystem_of
from rayswift.data.flow.cache import code_hash
from rayswift.train.checkpoints import manifest as checkpoints

if TYPE_CHECKING:
    from rayswift.train.config import WorkerConfig
    from rayswift.train.loader import Rank
    from rayswift.train.trainers.step import StepTraining


class CheckpointStore:
    """Brings checkpoints to the run directory and back.

    On a file system the Trainer writes straight into the run directory; for a bucket it writes into a local folder
    of this node, which ``ray.train.report`` uploads.
    """

    def __init__(self, config: WorkerConfig, rank: Rank, local_rank: int, local_world_size: int) -> None:
        self.config, self.rank = config, rank
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.remote = "://" in config.run_uri
        self.filesystem, self.run_path = filesystem_of(config.run_uri)
        name = os.path.basename(config.run_uri)
        self.local_dir = os.path.join(tempfile.gettempdir(), f"rayswift-{name}") if self.remote else self.run_path
        os.makedirs(self.local_dir, exist_ok=True)

    def resume_from(self) -> tuple[str | None, int]:
        """The newest whole checkpoint of this run, else the one the run was told to start from; rank 0 decides."""
        import torch

        found: list[Any] = [None]
        if self.rank.rank == 0:
            whole = checkpoints.list_checkpoints(self.filesystem, self.run_path)
            # Of an attempt that died: what it left half-done, or what came to harm since.
            checkpoints.make_way(self.filesystem, self.run_path, whole[-1].step if whole else -1)
            whole = checkpoints.list_checkpoints(self.filesystem, self.run_path)
            found = [(whole[-1].path, whole[-1].step) if whole else None]
            if not whole and self.config.resume:
                found = [(self.config.resume, int(self.config.resume.rstrip("/").rsplit("-", 1)[1]))]
        if self.rank.world_size > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        if found[0] is None:
            return None, 0
        path, step = found[0]
        return self.fetch(path), step

    def fetch(self, path: str) -> str:
        """A checkpoint as a folder of this node; every worker calls it."""
        import torch

        if not self.remote or os.path.isdir(path):
            return path
        local = os.path.join(self.local_dir, "resume", os.path.basename(path))
        if self.local_rank == 0:
            from pyarrow import fs

            shutil.rmtree(local, ignore_errors=True)
            fs.copy_files(path, local, source_filesystem=self.filesystem)
        if self.rank.world_size > 1:
            torch.distributed.barrier()
        return local

    def position(self, checkpoint: str | None) -> checkpoints.Position | None:
        """The position in a checkpoint that :meth:`resume_from` gave."""
        from pyarrow import fs

        return checkpoints.read_position(fs.LocalFileSystem(), checkpoint) if checkpoint else None

    def kept_steps(self) -> list[int]:
        """The steps of the run's whole checkpoints."""
        return [found.step for found in checkpoints.list_checkpoints(self.filesystem, self.run_path)]

    def history(self, checkpoint: str | None) -> list[dict[str, Any]]:
        """The logged rows up to a checkpoint that :meth:`resume_from` gave."""
        if checkpoint is None or not os.path.exists(os.path.join(checkpoint, "trainer_state.json")):
            return []
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            rows = json.load(file)["log_history"]
        return [row for row in rows if "global_step" in row]

    def begin(self, trainer: StepTraining) -> None:
        """Before the first file of a checkpoint is written."""
        if self.rank.rank == 0:
            name = f"checkpoint-{trainer.state.global_step}"
            checkpoints.begin_checkpoint(self.filesystem, self.run_path, name)

    def commit(self, trainer: StepTraining) -> None:
        """Make the checkpoint of this step whole: hash, report, then the manifest; then remove surplus ones."""
        import ray.train
        import torch
        from ray.train import Checkpoint, CheckpointUploadMode

        step = trainer.state.global_step
        name = f"checkpoint-{step}"
        local = os.path.join(self.local_dir, name)
        if self.rank.rank == 0:
            self.config.args.save(os.path.join(local, "args.json"))
            stream = trainer.loader.stream_places(step)
            batch = self.config.schedule.global_batch_size
            data, model = self.config.data.fingerprint, self.config.model_fingerprint
            checkpoints.Position(batch, data, stream, code_hash(), model).write(local)
        if self.rank.world_size > 1:
            torch.distributed.barrier()
        shares = [checkpoints.hash_files(local, self.local_rank, self.local_world_size, sync=not self.remote)]
        if self.rank.world_size > 1:
            gathered: list[Any] = [None] * self.rank.world_size
            torch.distributed.all_gather_object(gathered, shares[0])
            shares = gathered
        # One worker per node uploads the node's folder; on a shared file system the files are in place already.
        carries = self.local_rank == 0 if self.remote else True
        mode = CheckpointUploadMode.SYNC if self.remote else CheckpointUploadMode.NO_UPLOAD
        filesystem = None if self.remote else self.filesystem
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(local, filesystem) if carries else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=mode,
        )
        if self.rank.rank == 0:
            files = {file: entry for share in shares for file, entry in share.items()}
            self._finish(name, files, trainer.state)
        if self.remote and self.local_rank == 0:
            shutil.rmtree(local, ignore_errors=True)
        if self.rank.world_size > 1:
            torch.distributed.barrier()

    def _finish(self, name: str, files: dict[str, dict[str, Any]], state: Any) -> None:
        """Rank 0, last: the manifest, what it replaces, and the news."""
        args, step = self.config.args, state.global_step
        if not self.remote:
            checkpoints.sync_folder(self.run_path)
        checkpoints.write_manifest(self.filesystem, f"{self.run_path}/{name}", step, files)
        checkpoints.end_checkpoint(self.filesystem, self.run_path, name)
        checkpoints.keep_only(self.filesystem, self.run_path, args.save_total_limit, state.best_model_checkpoint)
        if args.create_checkpoint_symlink and not self.remote:
            for link, target in (("last", step), ("best", state.best_global_step or step)):
                temporary = os.path.join(self.run_path, f".{link}")
                with contextlib.suppress(FileNotFoundError):  # of a run that was killed just here
                    os.unlink(temporary)
                os.symlink(f"checkpoint-{target}", temporary)
                os.replace(temporary, os.path.join(self.run_path, link))
        self.config.events.push.remote({"event": "checkpoint", "step": step, "best": state.best_global_step})

    def close(self) -> None:
        """Remove this node's staging folder."""
        if self.remote and self.local_rank == 0:
            shutil.rmtree(self.local_dir, ignore_errors=True)
