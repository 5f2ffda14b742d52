//! Why a call on a live file or directory was refused, as file systems say it.

use crate::error::{Error, Kind};

#[derive(Debug)]
pub enum Refusal {
    NotFound,
    Exists,
    NotDirectory,
    IsDirectory,
    NotEmpty,
    NameTooLong,
    Invalid,
    /// The machine belongs to another host, or the mount is read-only.
    ReadOnly,
    /// The file belongs to a state of the machine that is gone.
    Stale,
    NoAttribute,
    NoSpace,
    TooLarge,
    TooBig,
    NotPermitted,
    NotSupported,
    /// The other name is another machine's.
    OtherMachine,
    Busy,
    /// The repository or the spool failed.
    Failed(Error),
    /// The spool failed in such a way that a page which nobody synced is lost.
    Lost(Error),
}

pub type Answer<T> = std::result::Result<T, Refusal>;

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::NoSpace => Self::NoSpace,
            _ => Self::Failed(error),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Failed(error) | Refusal::Lost(error) => error,
            Refusal::NoSpace => Self::new(Kind::NoSpace, "the spool has no room").hint("free some space and repeat"),
            Refusal::ReadOnly => Self::conflict("the machine's live is read-only here"),
            other => Self::usage(format!("{other:?}")),
        }
    }
}
