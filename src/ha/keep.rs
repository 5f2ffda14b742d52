//! Which epochs are kept, as the operator's file says it: for all machines, and for one.

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::gc::retention::{Policy, parse_duration};

/// The rules of a table `keep`. An epoch stays if any of them keeps it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Keep {
    /// The newest epochs.
    pub last: u64,
    /// Epochs that are at most so much older than the newest, such as `36h` or `14d`.
    pub within: Option<String>,
    /// The newest epoch of each of so many seconds, minutes, and so on.
    pub secondly: u64,
    pub minutely: u64,
    pub hourly: u64,
    pub daily: u64,
    pub weekly: u64,
    pub monthly: u64,
    pub yearly: u64,
}

impl Keep {
    pub fn policy(&self) -> Result<Policy> {
        let within = self.within.as_deref().map(parse_duration).transpose();
        let within = within.map_err(|error| Error::usage(format!("within = {:?}: {error}", self.within)))?;
        let counts = [self.secondly, self.minutely, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        let policy = Policy::new(self.last, within, counts);
        if policy.is_empty() {
            return Err(Error::usage("no rule says what to keep")
                .hint("write at least one of last, within, hourly, daily, ...; or leave the table out"));
        }
        Ok(policy)
    }
}
