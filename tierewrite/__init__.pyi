# The public interface, declared once: type checkers read this file, and __init__.py loads from it what is asked for.

from .batches.results import BatchInterrupted as BatchInterrupted
from .batches.results import BatchReport as BatchReport
from .batches.results import BatchResult as BatchResult
from .batches.run import batch as batch
from .consumers import ReadinessReport as ReadinessReport
from .consumers import check as check
from .engines.progress import Progress as Progress
from .errors import ConfigError as ConfigError
from .errors import HeaderError as HeaderError
from .errors import Interrupted as Interrupted
from .errors import NotReady as NotReady
from .errors import Refused as Refused
from .errors import ShardIndexError as ShardIndexError
from .errors import SourceChanged as SourceChanged
from .errors import SourceError as SourceError
from .errors import SystemFailure as SystemFailure
from .errors import TieFileError as TieFileError
from .errors import TierewriteError as TierewriteError
from .errors import UsageError as UsageError
from .errors import VerificationFailed as VerificationFailed
from .expanding import Expansion as Expansion
from .expanding import expand as expand
from .in_memory import dedupe_state_dict as dedupe_state_dict
from .inspection import Inspection as Inspection
from .inspection import inspect as inspect
from .numbers import nvfp4 as nvfp4
from .output.push import push as push
from .pages import Page as Page
from .pages import report_page as report_page
from .planning.plan import RewritePlan as RewritePlan
from .proof.integrity import Integrity as Integrity
from .proof.integrity import verify_integrity as verify_integrity
from .proof.verify import Verification as Verification
from .proof.verify import verify as verify
from .report import Report as Report
from .rewriting.run import plan as plan
from .rewriting.run import prepare_for_vllm as prepare_for_vllm
from .rewriting.run import rewrite as rewrite
from .streaming.stream import Stream as Stream
from .streaming.stream import stream as stream
from .ties.tie_map import TieMap as TieMap

__version__: str
