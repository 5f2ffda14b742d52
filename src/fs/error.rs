//! The one place where refusals become error numbers.

use rustix::io::Errno;

use crate::epoch::live::Refusal;
use crate::error::{Error, Kind};

/// The number of a refusal. What nobody asked for is logged.
pub fn errno(refusal: &Refusal) -> Errno {
    match refusal {
        Refusal::NotFound => Errno::NOENT,
        Refusal::Exists => Errno::EXIST,
        Refusal::NotDirectory => Errno::NOTDIR,
        Refusal::IsDirectory => Errno::ISDIR,
        Refusal::NotEmpty => Errno::NOTEMPTY,
        Refusal::NameTooLong => Errno::NAMETOOLONG,
        Refusal::Invalid => Errno::INVAL,
        Refusal::ReadOnly => Errno::ROFS,
        Refusal::Stale => Errno::STALE,
        Refusal::NoAttribute => Errno::NODATA,
        Refusal::NoSpace => Errno::NOSPC,
        Refusal::TooLarge => Errno::FBIG,
        Refusal::TooBig => Errno::TOOBIG,
        Refusal::NotPermitted => Errno::PERM,
        Refusal::NotSupported => Errno::OPNOTSUPP,
        Refusal::OtherMachine => Errno::XDEV,
        Refusal::Busy => Errno::BUSY,
        Refusal::Failed(error) | Refusal::Lost(error) => of_error(error),
    }
}

fn of_error(error: &Error) -> Errno {
    match error.kind() {
        Kind::NotFound => {
            tracing::debug!("{error}");
            Errno::NOENT
        }
        Kind::Usage => {
            tracing::warn!("{error}");
            Errno::INVAL
        }
        Kind::Conflict => {
            tracing::warn!("{error}");
            Errno::EXIST
        }
        Kind::Fenced => {
            tracing::error!("{error}");
            Errno::STALE
        }
        Kind::NoSpace => {
            tracing::warn!("{error}");
            Errno::NOSPC
        }
        Kind::Damaged | Kind::Unsupported | Kind::Io | Kind::Unavailable => {
            tracing::error!("{error}");
            Errno::IO
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_an_input_output_error_and_a_lost_term_is_stale() {
        assert_eq!(errno(&Error::damaged("a page").into()), Errno::IO);
        assert_eq!(errno(&Error::new(Kind::Fenced, "web1").into()), Errno::STALE);
        assert_eq!(errno(&Error::new(Kind::NoSpace, "spool").into()), Errno::NOSPC);
    }
}
