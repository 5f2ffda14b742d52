//! What a command works with: the repository it names, and how to print.

use std::path::PathBuf;

use super::Global;
use super::output;
use super::progress::Progress;
use crate::epoch::EpochStore;
use crate::error::{Error, Result};
use crate::repo::state_dir;

pub struct Context {
    global: Global,
}

impl Context {
    pub fn new(global: Global) -> Self {
        Self { global }
    }

    pub fn json(&self) -> bool {
        self.global.json
    }

    /// A notice for people, on stderr.
    pub fn notice(&self, text: &str) {
        if !self.global.quiet {
            output::notice(text);
        }
    }

    /// A progress bar, hidden where nobody would see it.
    pub fn progress(&self, what: &str) -> Progress {
        Progress::new(what, !self.global.quiet)
    }

    /// Prints the document in JSON, or else calls `text`.
    pub fn print(&self, document: &serde_json::Value, text: impl FnOnce() -> String) -> Result<()> {
        output::print(&if self.json() { format!("{document:#}\n") } else { text() })
    }

    pub fn state_directory(&self) -> PathBuf {
        match &self.global.state_dir {
            Some(path) => path.clone(),
            None => state_dir(&|name| std::env::var(name).ok(), rustix::process::geteuid().is_root()),
        }
    }

    /// The directory that the repository's URL names.
    pub fn repository_path(&self) -> Result<PathBuf> {
        let Some(url) = self.global.repo.as_deref().filter(|url| !url.is_empty()) else {
            return Err(Error::usage("no repository is named").hint("give --repo DIR, or set EPOCHFS_REPO"));
        };
        parse_url(url)
    }

    /// The repository's URL, as another process can be given it.
    pub fn repository_url(&self) -> Result<String> {
        let path = self.repository_path()?;
        let absolute =
            std::path::absolute(&path).map_err(|error| Error::io(format!("the path {}", path.display()), error))?;
        match absolute.to_str() {
            Some(text) => Ok(format!("file://{text}")),
            None => Err(Error::usage(format!("the repository {}: its path is not text", absolute.display()))),
        }
    }

    /// Whether a repository is named at all.
    pub fn names_repository(&self) -> bool {
        self.global.repo.as_deref().is_some_and(|url| !url.is_empty())
    }

    /// Opens the repository.
    pub fn open(&self) -> Result<EpochStore> {
        Ok(EpochStore::open_directory(&self.repository_path()?)?.with_state(self.state_directory()))
    }

    /// Opens another repository, with this host's state of it.
    pub fn open_other(&self, url: &str) -> Result<EpochStore> {
        Ok(EpochStore::open_directory(&parse_url(url)?)?.with_state(self.state_directory()))
    }

    /// Where this host keeps what belongs to an opened repository.
    pub fn local_directory(&self, store: &EpochStore) -> PathBuf {
        store.repository().local_directory(&self.state_directory())
    }

    /// Whether the logs that the user asked for are more, or fewer, than usual.
    pub fn verbosity(&self) -> (u8, bool) {
        (self.global.verbose, self.global.quiet)
    }

    /// Opens the page index now, and shows the progress if it must be rebuilt.
    pub fn open_index(&self, store: &EpochStore) {
        let bar = self.progress("rebuilding the page index");
        let shown = bar.clone();
        let (_, rebuilt) = store.index(Some(Box::new(move |done, total| shown.set_items(done, total))));
        bar.finish();
        if let Some(rebuilt) = rebuilt
            && rebuilt.objects > 0
        {
            self.notice(&format!("rebuilt the page index from {} objects: {}", rebuilt.objects, rebuilt.reason));
        }
    }
}

fn parse_url(url: &str) -> Result<PathBuf> {
    let path = match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => path,
        Some(("file", _)) => {
            return Err(Error::usage(format!("{url}: a file:// URL has an absolute path behind it"))
                .hint("for example file:///srv/epochs"));
        }
        Some((scheme, _)) => {
            return Err(Error::usage(format!("{url}: repositories of the kind {scheme}:// are not supported"))
                .hint("give a directory, or a file:// URL"));
        }
        None => url,
    };
    Ok(PathBuf::from(path))
}
