//! Wall-clock time, for people only: no decision about safety depends on it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970, or 0 on a machine whose clock is before that.
#[allow(clippy::disallowed_methods)] // The one place that reads the clock.
pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| u64::try_from(elapsed.as_nanos()).unwrap_or(0))
}
