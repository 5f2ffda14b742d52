//! The page index of this host: is it there, and can it be used?

use std::path::Path;

use super::Check;
use crate::repo::{Index, IndexState, Repository};

pub(super) fn check(repository: &Repository, state_directory: &Path) -> Check {
    const NAME: &str = "page-index";
    const REBUILT: &str = "nothing: the next commit makes it anew, which takes a while with a large repository";
    let directory = repository.local_directory(state_directory).join("index");
    match Index::inspect(&directory, repository.id()) {
        IndexState::Missing => {
            Check::ok(NAME, format!("none yet in {}: the next commit makes it", directory.display()))
        }
        IndexState::Complete { pages } => Check::ok(NAME, format!("complete, about {pages} pages")),
        IndexState::Distrusted => Check::warn(NAME, "it was found wrong, and is not used", REBUILT),
        IndexState::Unusable => Check::warn(NAME, "it is incomplete, older, or another repository's", REBUILT),
        IndexState::Damaged(why) => Check::warn(NAME, format!("it is damaged: {why}"), REBUILT),
    }
}
