"""Arrays of numpy in files of strangers; it lives in `advkit.core.archives`."""

from __future__ import annotations

from advkit.core.archives import RATIO as RATIO
from advkit.core.archives import archive_keys as archive_keys
from advkit.core.archives import check_array as check_array
from advkit.core.archives import read_archive as read_archive
