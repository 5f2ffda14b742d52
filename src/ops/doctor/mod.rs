//! Examining a host and a repository: does everything that epochs lean on hold here?
//!
//! Each check says what it found and what to do about it. None changes anything that lasts: what a check writes, it
//! removes again.

mod file_system;
mod fuse;
mod host;
mod mount;
mod page_index;
mod race;
mod repository;
mod space;
mod virtualization;

pub use race::prove_put_if_absent;

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::platform::keys::KeySettings;
use crate::platform::store::{Location, Store};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// It works, but slower, with less room, or with a part that is missing.
    Warn,
    /// Something does not work, or the repository is not safe here.
    Fail,
    /// Nothing to check, or a check that this one needs came out badly.
    Skipped,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
            Self::Skipped => "skipped",
        }
    }
}

/// One check with its outcome.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Check {
    /// Stable: scripts may look for it.
    pub name: &'static str,
    pub status: Status,
    pub found: String,
    /// What to do, where something should be done.
    pub next_step: Option<String>,
}

impl Check {
    fn new(name: &'static str, status: Status, found: impl Into<String>, next_step: Option<String>) -> Self {
        Self { name, status, found: found.into(), next_step }
    }

    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, found, None)
    }

    fn warn(name: &'static str, found: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self::new(name, Status::Warn, found, Some(next_step.into()))
    }

    fn fail(name: &'static str, found: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self::new(name, Status::Fail, found, Some(next_step.into()))
    }

    fn skipped(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Skipped, found, None)
    }

    /// A check that an error ended: the error's own advice comes first.
    fn failed(name: &'static str, error: &Error, otherwise: &str) -> Self {
        Self::fail(name, error.to_string(), error.next_step().unwrap_or(otherwise))
    }
}

/// How to reach the repository that is examined.
pub struct RepositorySubject {
    pub location: Location,
    /// Opens the store anew, as another process would.
    pub open: Box<dyn Fn() -> Result<Arc<dyn Store>> + Sync>,
    /// Where to look for its key, if it is encrypted.
    pub keys: KeySettings,
}

/// What is examined.
pub struct Subject {
    pub state_directory: PathBuf,
    pub repository: Option<RepositorySubject>,
}

/// Makes every check, in an order that suits a reader.
pub fn examine(subject: &Subject) -> Vec<Check> {
    let mut checks = host::check();
    checks.extend(fuse::check());
    checks.push(mount::check_request_size());
    checks.extend(virtualization::check());
    checks.extend(space::check_state(&subject.state_directory));
    checks.extend(repository::check(subject));
    checks
}
