"""vLLM's executor for processes that were launched together; imports vLLM, which itself looks it up by name."""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class LaunchedExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]
    """The group's sums go through torch.distributed, on a CPU too.

    There vLLM would take shared memory under a name that follows from the address of the group alone: `env://` of all
    runs on a machine, so that two of them, or one after another that was killed, stand in each other's way, and who
    waits there for a process that has died waits for ever. Where the ranks' addresses differ it leaves that out. The
    address is used for nothing else, for the processes have found each other before.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        address, rank, local_rank = super()._distributed_args()
        return f"{address}{rank}", rank, local_rank
