//! What `status` tells of the repository's store.

use serde::{Deserialize, Serialize};

use crate::platform::store::{CacheTotals, Reach, Store, TrafficTotals};

/// The store as this mount uses it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Requests over the network, those that were repeated included; none for a directory.
    pub requests: Option<TrafficTotals>,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Since when the service has not answered, in nanoseconds since 1970, if it does not.
    pub unreachable_since_ns: Option<u64>,
    pub last_failure: Option<String>,
    /// What is kept of a bucket on this host's disk.
    #[serde(default)]
    pub cache: Option<CacheTotals>,
}

impl StoreStatus {
    pub fn of(store: &dyn Store) -> Self {
        let totals = store.counters().totals();
        let Reach { unreachable_since_ns, last_failure } = store.reach();
        Self {
            requests: store.traffic(),
            read_bytes: totals.bytes_read,
            written_bytes: totals.bytes_written,
            unreachable_since_ns,
            last_failure,
            cache: store.cache(),
        }
    }
}
