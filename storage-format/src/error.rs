//! Why bytes were refused.

/// A decoder's refusal. Nothing is ever half decoded: a value is returned whole and checked, or one of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("{what} ends too early")]
    Truncated { what: &'static str },
    #[error("{what} does not begin with its magic bytes")]
    Magic { what: &'static str },
    #[error("{what} fails its checksum")]
    Checksum { what: &'static str },
    #[error("{what} is damaged: {why}")]
    Invalid { what: &'static str, why: &'static str },
    #[error("{what} is not the one asked for: {why}")]
    Mismatch { what: &'static str, why: &'static str },
    #[error(
        "{what} has format version {found}, and this program reads up to {known}: use a newer epochfs",
        known = newest(what)
    )]
    NewerVersion { what: &'static str, found: u16 },
    #[error("{what} uses features this program does not know (flags {flags:#x}): use a newer epochfs")]
    UnknownFeatures { what: &'static str, flags: u32 },
    #[error("{what} is not allowed: {why}")]
    Name { what: &'static str, why: &'static str },
}

/// The newest version of such a thing that this program reads.
fn newest(what: &str) -> u16 {
    if what == crate::descriptor::VERSIONED { crate::SEALED_VERSION } else { crate::FORMAT_VERSION }
}

pub type Result<T> = std::result::Result<T, FormatError>;

pub(crate) fn invalid<T>(what: &'static str, why: &'static str) -> Result<T> {
    Err(FormatError::Invalid { what, why })
}
