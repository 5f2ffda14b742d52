//! The one error type. Its kind tells the caller what to do; its text names the object and the next step.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong: a bad name, an impossible option. Change it.
    Usage,
    /// The named thing does not exist.
    NotFound,
    /// Somebody else won: another writer committed first, the name is taken, or another owner holds the machine.
    Conflict,
    /// This owner's term is over. It must stop writing for good.
    Fenced,
    /// Stored bytes are not what was written. Never served; `epochfs verify` tells the extent.
    Damaged,
    /// Written by a newer or otherwise unreadable version of the format.
    Unsupported,
    /// No room on the device or quota. Free space and repeat.
    NoSpace,
    /// The operating system or the store refused or failed. Repeating may help.
    Io,
    /// The store cannot be reached, or is too busy. Repeating helps as soon as it is back.
    Unavailable,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Usage,
        Self::NotFound,
        Self::Conflict,
        Self::Fenced,
        Self::Damaged,
        Self::Unsupported,
        Self::NoSpace,
        Self::Io,
        Self::Unavailable,
    ];

    /// Its name in documents. Stable: scripts and other processes go by it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Fenced => "fenced",
            Self::Damaged => "damaged",
            Self::Unsupported => "unsupported",
            Self::NoSpace => "no_space",
            Self::Io => "io",
            Self::Unavailable => "unavailable",
        }
    }

    /// Whether it tells of an object that something else should be found for, and not of the store.
    pub fn is_of_object(self) -> bool {
        matches!(self, Self::Damaged | Self::NotFound | Self::Unsupported)
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An error with its kind, a sentence, and optionally a hint about what to do next.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    unwritable: bool,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None, unwritable: false }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, message)
    }

    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, message)
    }

    /// An error of the operating system, with what was being done to which object.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::NotFound => Kind::NotFound,
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => Kind::NoSpace,
            _ => Kind::Io,
        };
        let hint = match source.kind() {
            Io::StorageFull | Io::QuotaExceeded => Some("free some space and repeat; nothing was lost"),
            Io::PermissionDenied => Some("check the owner and mode of that path, or run as a user who may use it"),
            Io::ReadOnlyFilesystem => Some("the file system is mounted read-only"),
            _ => None,
        };
        Self {
            kind,
            message: what.into(),
            hint: hint.map(str::to_owned),
            source: Some(Box::new(source)),
            unwritable: false,
        }
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts what was being done in front of the message, and keeps kind, hint and source.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Says that nothing can be written there any more, though it may be read.
    #[must_use]
    pub fn unwritable(mut self) -> Self {
        self.unwritable = true;
        self
    }

    /// Whether nothing can be written there: no room, no permission, mounted read-only, or given up after a failure.
    pub fn is_unwritable(&self) -> bool {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        let source = self.source.as_ref().and_then(|source| source.downcast_ref::<std::io::Error>());
        self.unwritable
            || self.kind == Kind::NoSpace
            || source.is_some_and(|source| matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem))
    }

    /// The process exit code for this error.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Usage => 2,
            Kind::Damaged => 3,
            Kind::Conflict | Kind::Fenced => 4,
            Kind::NotFound => 5,
            Kind::Unsupported | Kind::NoSpace | Kind::Io | Kind::Unavailable => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<epochfs_format::FormatError> for Error {
    fn from(error: epochfs_format::FormatError) -> Self {
        let kind = match error {
            epochfs_format::FormatError::NewerVersion { .. } => Kind::Unsupported,
            _ => Kind::Damaged,
        };
        Self::new(kind, error.to_string())
    }
}
