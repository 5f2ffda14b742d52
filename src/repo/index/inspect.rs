//! Looking at an index without owning or changing it.

use std::path::Path;

use super::database::Database;
use super::pending;

/// What is found where the index belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexState {
    Missing,
    /// Of this repository and layout; about so many pages.
    Complete {
        pages: u64,
    },
    /// A process found it wrong: it is rebuilt when it is next opened.
    Distrusted,
    /// Incomplete, of an older layout, or of another repository.
    Unusable,
    Damaged(String),
}

pub(super) fn inspect(directory: &Path, repository: &[u8; 16]) -> IndexState {
    let path = Database::path(directory);
    if !path.exists() {
        return IndexState::Missing;
    }
    if pending::rebuild_requested(directory) {
        return IndexState::Distrusted;
    }
    match Database::look(&path, repository) {
        Err(error) => IndexState::Damaged(error.to_string()),
        Ok(None) => IndexState::Unusable,
        Ok(Some(pages)) => IndexState::Complete { pages },
    }
}
