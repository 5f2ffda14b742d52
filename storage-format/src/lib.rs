#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{what} was written by a newer version ({found})")]
    NewerVersion { what: &'static str, found: u16 },
}
