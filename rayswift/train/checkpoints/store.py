"""How checkpoints get to the run directory and back, from inside the workers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pyarrow import fs

from rayswift.data.files import filesystem_of
from rayswift.data.flow.cache import code_hash
from rayswift.errors import one_line
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.checkpoints.snapshot import checkpoint_bytes, take_snapshot

if TYPE_CHECKING:
    from rayswift.train.config import WorkerConfig
    from rayswift.train.loader import Rank
    from rayswift.train.trainers.step import StepTraining

T = TypeVar("T")

#: How the address of a state that is held begins.
KEPT = "kept://"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: How the writers of safetensors (an error of Rust's) and of torch (which has no reason to give) say it.
_SAYS_NO_ROOM = re.compile(
    rf"os error ({'|'.join(map(str, _NO_ROOM))})\b|PytorchStreamWriter failed writing|unexpected pos \d+ vs"
)


def no_room(error: BaseException | None) -> str:
    """In a few words that a disk was full, where that is what an error came from; else ``""``."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return os.strerror(error.errno)
        if found := _SAYS_NO_ROOM.search(str(error)):
            return os.strerror(int(found[1])) if found[1] else os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return ""


class Behind:
    """A checkpoint that a thread of rank 0 writes. ``save``: how; None on other ranks."""

    def __init__(self, step: int, save: Callable[[], None] | None) -> None:
        self.step = step
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(save,), name="rayswift-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[], None] | None) -> None:
        try:
            if save is not None:
                save()
        except Exception as error:
            self._error = error

    def error(self) -> Exception | None:
        """What went wrong, when it has ended."""
        self._thread.join()
        return self._error


class CheckpointStore:
    """Brings checkpoints to the run directory and back.

    On a file system they are written straight into the run directory; for a bucket into a local folder of this node,
    which is uploaded (by ``ray.train.report`` where every node holds a part).
    """

    def __init__(self, config: WorkerConfig, rank: Rank, local_rank: int, local_world_size: int) -> None:
        self.config, self.rank = config, rank
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.remote = "://" in config.run_uri
        self.filesystem, self.run_path = filesystem_of(config.run_uri)
        name = os.path.basename(config.run_uri)
        self._staging = os.path.join(tempfile.gettempdir(), f"rayswift-{name}")
        self.local_dir = self._staging if self.remote else self.run_path
        self._size = 0  # bytes of the checkpoint before
        self.waiting: set[str] = set()  # checkpoints that are evaluated
        self._keeping = threading.Lock()
        self._behind: Behind | None = None
        os.makedirs(self.local_dir, exist_ok=True)

    def resume_from(self, kept_step: int = 0) -> tuple[str | None, int, bool]:
        """What the run goes on from, its step, and whether it was told to start from there. That is the state of the
        step that is held (see :class:`~rayswift.train.checkpoints.last_step.LastStep`) where no checkpoint is as new,
        the newest whole checkpoint of this run, or what it was told. Rank 0 decides."""
        import torch

        found: list[Any] = [None]
        if self.rank.rank == 0:
            whole = checkpoints.list_checkpoints(self.filesystem, self.run_path)
            # Of an attempt that died: what it left half-done, or what came to harm since.
            checkpoints.make_way(self.filesystem, self.run_path, whole[-1].step if whole else -1)
            whole = checkpoints.list_checkpoints(self.filesystem, self.run_path)
            told = (self.config.resume, self.config.resume_step, True) if self.config.resume else None
            found = [told]
            if whole and not (told and told[1] >= whole[-1].step):
                prefix = self.config.run_uri.removesuffix(self.run_path)
                found = [(prefix + whole[-1].path, whole[-1].step, False)]
            if kept_step > (found[0][1] if found[0] else 0):
                found = [(f"{KEPT}checkpoint-{kept_step}", kept_step, False)]
        if self.rank.world_size > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        if found[0] is None:
            return None, 0, False
        uri, step, told = found[0]
        return self.fetch(uri), step, told

    def fetch(self, uri: str) -> str:
        """A checkpoint as a folder of this node; every worker calls it."""
        import torch

        if "://" not in uri:
            return uri
        local = os.path.join(self._staging, "resume", os.path.basename(uri))
        if self.local_rank == 0:
            shutil.rmtree(local, ignore_errors=True)
            if uri.startswith(KEPT):
                self.config.events.ask("kept_state").write(local)
            else:
                filesystem, path = filesystem_of(uri)
                fs.copy_files(path, local, source_filesystem=filesystem)
        if self.rank.world_size > 1:
            torch.distributed.barrier()
        return local

    def scratch(self, name: str) -> str:
        """An empty folder of this worker, which goes with the staging folder."""
        folder = os.path.join(self._staging, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, mode=0o700)
        return folder

    def position(self, checkpoint: str | None) -> checkpoints.Position | None:
        """The position in a checkpoint that :meth:`resume_from` gave."""
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

    def check_room(self, model: Any) -> None:
        """Say before the first step that two checkpoints have no room: one is deleted when the next is whole."""
        if self.remote or self.rank.rank > 0:
            return
        need, free = 2 * checkpoint_bytes(model, self.config.args), shutil.disk_usage(self.run_path).free
        if free < need:
            line = (f"warning: {self.run_path} has room for {free / 2**30:.2f} GiB, and two checkpoints take about "
                    f"{need / 2**30:.2f}: those that find none are not saved (--save_total_limit 1 keeps one, "
                    "--save_only_model true saves no optimiser)")  # fmt: skip
            self.config.events.tell("push", {"event": "note", "line": line})

    def save(self, trainer: StepTraining, write: Callable[[], None]) -> bool:
        """Save this step's checkpoint: while training goes on where its state can be copied (:meth:`settle` waits for
        it), else at once by ``write``, which writes the Trainer's files on every worker.

        Where the disk has no room for it (or a quota, or a limit of the system) training goes on without it: what was
        written of it is deleted, those before it stay, one line says so, and False is returned on every worker; of one
        that is written meanwhile, `trainer.not_saved` is told when it is settled.
        """
        self.settle(trainer)
        started, step = time.monotonic(), trainer.state.global_step
        name = f"checkpoint-{step}"
        local = os.path.join(self.local_dir, name)
        if (later := take_snapshot(trainer, self.of_all)) is None:
            return self._save_now(trainer, write, name, local)
        describe = self.describer(trainer)
        best, best_path = trainer.state.best_global_step, trainer.state.best_model_checkpoint

        def save() -> None:
            self._begin(name)
            later(local)
            describe(local)
            files = checkpoints.hash_files(local, sync=not self.remote)
            if self.remote:
                fs.copy_files(local, f"{self.run_path}/{name}", destination_filesystem=self.filesystem)
            self._finish(name, step, files)
            self._tidy(step, best, best_path, waited=waited, seconds=time.monotonic() - started)

        waited = time.monotonic() - started
        self._behind = Behind(step, save if self.rank.rank == 0 else None)
        return True

    def settle(self, trainer: StepTraining) -> None:
        """Wait until a checkpoint that is being written is whole or given up; every worker calls it."""
        if (behind := self._behind) is None:
            return
        self._behind = None
        error = behind.error()
        reason = no_room(error)
        told = self.of_all((reason, "" if error is None else one_line(error)))[0]
        name = f"checkpoint-{behind.step}"
        local = os.path.join(self.local_dir, name)
        if error is not None and not reason:
            raise error
        if told[0]:
            self._give_up(name, local, told[0])
            trainer.not_saved(behind.step)
        elif told[1]:
            raise RuntimeError(f"{name} could not be saved by worker 0: {told[1]}")
        elif self.remote and self.rank.rank == 0:
            shutil.rmtree(local, ignore_errors=True)

    def _save_now(self, trainer: StepTraining, write: Callable[[], None], name: str, local: str) -> bool:
        step = trainer.state.global_step
        describe = self.describer(trainer)
        share: dict[str, dict[str, Any]] = {}

        def description() -> None:
            if self.rank.rank == 0:
                describe(local)

        def hash_share() -> None:
            sync = not self.remote
            share.update(checkpoints.hash_files(local, self.local_rank, self.local_world_size, sync=sync))

        def finish() -> None:
            if self.rank.rank == 0:
                self._finish(name, step, {file: entry for one in shares for file, entry in one.items()})

        for part in (lambda: self._begin(name), write, description, hash_share):
            if reason := self._attempt(part):
                return self._give_up(name, local, reason)
        shares = self.of_all(share)
        self._report(name, local, step)
        if reason := self._attempt(finish):
            return self._give_up(name, local, reason)
        if self.rank.rank == 0:
            state = trainer.state
            self._tidy(step, state.best_global_step, state.best_model_checkpoint)
        if self.remote and self.local_rank == 0:
            shutil.rmtree(local, ignore_errors=True)
        return True

    def _attempt(self, part: Callable[[], None]) -> str:
        """Do a part of the work; why it had no room on one of the workers, else ``""``. They wait for each other."""
        reason = ""
        try:
            part()
        except Exception as error:
            if not (reason := no_room(error)):
                raise
        return next(filter(None, self.of_all(reason)), "")

    def of_all(self, value: T) -> list[T]:
        """The values of all workers, by rank."""
        import torch

        found: list[Any] = [value] * self.rank.world_size
        if self.rank.world_size > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def _give_up(self, name: str, local: str, reason: str) -> bool:
        if self.rank.rank == 0:
            with contextlib.suppress(OSError):
                checkpoints.delete_checkpoint(self.filesystem, f"{self.run_path}/{name}")
            with contextlib.suppress(OSError):
                checkpoints.end_checkpoint(self.filesystem, self.run_path, name)
            whole = checkpoints.list_checkpoints(self.filesystem, self.run_path)
            last = os.path.basename(whole[-1].path) if whole else "there is none yet"
            line = f"{name} was not saved ({reason}); training goes on, the last whole checkpoint: {last}"
            self.config.events.tell("push", {"event": "note", "line": line})
        if self.local_rank == 0:
            shutil.rmtree(local, ignore_errors=True)
        self.of_all(None)  # nobody begins the next one before this is gone
        return False

    def _begin(self, name: str) -> None:
        """Rank 0, before the first file is written. A checkpoint is about as large as the one before it."""
        if self.rank.rank == 0:
            if not self.remote and shutil.disk_usage(self.run_path).free < self._size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if os.path.isdir(left := f"{self.local_dir}/{name}"):  # by an attempt that died
                checkpoints.delete_checkpoint(fs.LocalFileSystem(), left)
            checkpoints.begin_checkpoint(self.filesystem, self.run_path, name)

    def describer(self, trainer: StepTraining) -> Callable[[str], None]:
        """What rank 0 writes beside the Trainer's files: its arguments and the place in the data that it is at now."""
        stream = trainer.loader.stream_places(trainer.state.global_step)
        batch = self.config.schedule.global_batch_size
        data, model = self.config.data.fingerprint, self.config.model_fingerprint
        position = checkpoints.Position(batch, data, stream, code_hash(), model)

        def describe(local: str) -> None:
            self.config.args.save(os.path.join(local, "args.json"))
            position.write(local)

        return describe

    def _report(self, name: str, local: str, step: int) -> None:
        """Tell Ray Train, which brings a bucket's files there."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

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

    def _finish(self, name: str, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Rank 0, last: the manifest."""
        if not self.remote:
            checkpoints.sync_folder(self.run_path)
        checkpoints.write_manifest(self.filesystem, f"{self.run_path}/{name}", step, files)
        self._size = sum(entry["size"] for entry in files.values())

    def _tidy(self, step: int, best: int | None, best_path: str | None, **times: float) -> None:
        """Rank 0, when a checkpoint is whole: remove what it replaces, and tell the news. ``times``: how long training
        waited for it, and how long it took."""
        checkpoints.end_checkpoint(self.filesystem, self.run_path, f"checkpoint-{step}")
        self.keep(step, best, best_path)
        self.config.events.tell("push", {"event": "checkpoint", "step": step, "best": best, **times})

    def keep(self, last: int, best: int | None, best_path: str | None) -> None:
        """Rank 0: keep the checkpoints that ``--save_total_limit`` means, and name the last and the best."""
        args = self.config.args
        with self._keeping:  # scores come in while a checkpoint is written
            checkpoints.keep_only(self.filesystem, self.run_path, args.save_total_limit, best_path, self.waiting)
        if args.create_checkpoint_symlink and not self.remote:
            with contextlib.suppress(OSError):  # a disk without room for a name
                self._link(last, best or last)

    def _link(self, last: int, best: int) -> None:
        for link, target in (("last", last), ("best", best)):
            temporary = os.path.join(self.run_path, f".{link}")
            with contextlib.suppress(FileNotFoundError):  # of a run that was killed just here
                os.unlink(temporary)
            os.symlink(f"checkpoint-{target}", temporary)
            os.replace(temporary, os.path.join(self.run_path, link))

    def close(self) -> None:
        """Remove this node's staging folder."""
        if self.local_rank == 0:
            shutil.rmtree(self._staging, ignore_errors=True)
