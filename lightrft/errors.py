"""Every error that lightrft raises on purpose.

Each class also inherits the builtin that it specialises, so that code which knows only the builtin catches it::

    LightRFTError (Exception)
    ├── ConfigError (ValueError)             a setting has a value that cannot work
    ├── SimulationError (RuntimeError)       the simulator was misused; base of what a simulated run reports
    │   ├── DeadlockError                    every rank waits, and none can go on
    │   ├── CollectiveMismatchError          ranks met in one collective and disagree about it
    │   ├── CollectiveTimeoutError (TimeoutError)   a collective outlasted the timeout of its group
    │   ├── RankFailedError                  the function raised an exception on one rank or more
    │   ├── NondeterminismError              the same seed gave another run
    │   ├── RefusedError                     a call that a real backend would refuse or get wrong
    │   ├── UnfinishedError                  a run ended with operations that nobody completed
    │   └── BlockedOutsideError              a rank waits for something that the simulator does not control
    ├── EngineStateError (RuntimeError)      the engine is not in a state that allows the call
    │   ├── LostRanksError                   ranks wait where no error reaches them; nothing can be agreed with them
    │   └── StaleWeightsError                the engine holds no weights, or old ones
    ├── WeightSyncError (RuntimeError)       the weights that arrived are not the weights that were expected
    ├── OffloadStateError (RuntimeError)     offload and load did not come in pairs
    ├── CheckpointError (OSError)            a checkpoint is missing, incomplete or does not fit
    ├── RewardError (RuntimeError)           there are no rewards for samples
    └── ContractError (AssertionError)       an implementation has what it is declared to lack

Every one of them can be pickled.
"""

from __future__ import annotations

__all__ = [
    "BlockedOutsideError",
    "CheckpointError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "ConfigError",
    "ContractError",
    "DeadlockError",
    "EngineStateError",
    "LightRFTError",
    "LostRanksError",
    "NondeterminismError",
    "OffloadStateError",
    "RankFailedError",
    "RefusedError",
    "RewardError",
    "SimWarning",
    "SimulationError",
    "StaleWeightsError",
    "UnfinishedError",
    "WeightSyncError",
]


class LightRFTError(Exception):
    """Base of every error of this package."""


class ConfigError(LightRFTError, ValueError):
    """A setting is unknown, or has a value that cannot work; the message names what is allowed."""


class SimulationError(LightRFTError, RuntimeError):
    """The simulator was misused (worlds were nested, for example), or a simulated run found something wrong.

    Attributes:
        report: What the run found, as data; ``None`` if the message says all there is. It is pickled with the error.
    """

    report: object | None

    def __init__(self, message: str, *, report: object | None = None) -> None:
        super().__init__(message)
        self.report = report


class DeadlockError(SimulationError):
    """Every rank waits for another one or has ended, and none can go on."""


class CollectiveMismatchError(SimulationError):
    """Ranks met in one collective but disagree about the operation, the shape, the dtype, the root or the reduction."""


class CollectiveTimeoutError(SimulationError, TimeoutError):
    """A collective or a wait outlasted the timeout of its group."""


class RankFailedError(SimulationError):
    """The function of the run raised an exception on one rank or more."""


class NondeterminismError(SimulationError):
    """Two runs from the same seed did not do the same."""


class RefusedError(SimulationError):
    """A call that at least one real backend refuses, or answers with wrong values. Raised inside the rank."""


class UnfinishedError(SimulationError):
    """A run ended and left operations behind that nobody completed or waited for."""


class BlockedOutsideError(SimulationError):
    """A rank waits for something that the simulator does not control, so that no other rank can run."""


class EngineStateError(LightRFTError, RuntimeError):
    """The engine is asleep, awake, busy or absent where the call needs it otherwise."""


class LostRanksError(EngineStateError):
    """Other ranks wait for this one where no error reaches them; it is raised on this one alone, to end its process."""


class StaleWeightsError(EngineStateError):
    """The engine was asked to generate with weights that are dropped or out of date."""


class WeightSyncError(LightRFTError, RuntimeError):
    """Weights sent to the engine are missing, unexpected, of the wrong shape, or unchanged after a step."""


class OffloadStateError(LightRFTError, RuntimeError):
    """A model was offloaded twice in a row, or loaded without having been offloaded."""


class CheckpointError(LightRFTError, OSError):
    """A checkpoint is missing, incomplete or does not fit what it is loaded into."""


class RewardError(LightRFTError, RuntimeError):
    """A reward function raised, a reward service did not answer, or an answer holds no rewards."""


class ContractError(LightRFTError, AssertionError):
    """An implementation is declared to lack a capability, and passes a check that needs it."""


class SimWarning(UserWarning):
    """Something works in the simulator but deserves a look before it runs on a cluster."""
