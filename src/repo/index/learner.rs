//! A thread that adds what commits stored to the index, so that they need not wait for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use crossbeam_channel::Sender;
use epochfs_format::{FooterBuilder, ObjectRef};

use super::database::Database;
use super::distrust;

/// Objects that may wait; a commit that is faster than the index is held back.
const QUEUE_MAX: usize = 4;

/// The thread. Dropping it waits until everything is learnt.
pub(super) struct Learner {
    queue: Option<Sender<(ObjectRef, FooterBuilder)>>,
    thread: Option<JoinHandle<()>>,
}

impl Learner {
    pub fn start(database: Arc<Database>, directory: &Path, distrusted: &Arc<AtomicBool>) -> Self {
        let (queue, objects) = crossbeam_channel::bounded::<(ObjectRef, FooterBuilder)>(QUEUE_MAX);
        let (directory, distrusted): (PathBuf, _) = (directory.to_owned(), distrusted.clone());
        let thread = std::thread::spawn(move || {
            for (object, footer) in objects {
                if let Err(error) = database.put(&object, footer.entries()) {
                    distrust(&distrusted, &directory, &format!("it could not learn new pages: {error}"));
                }
                tracing::debug!(pages = footer.block_count(), "index has learnt an object");
            }
        });
        Self { queue: Some(queue), thread: Some(thread) }
    }

    pub fn learn(&self, object: &ObjectRef, footer: &FooterBuilder) {
        let queue = self.queue.as_ref().expect("the queue is open until the learner is dropped");
        // The thread ends only with the queue, or by a panic, which its join reports.
        let _ = queue.send((object.clone(), footer.clone()));
    }
}

impl Drop for Learner {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the page index's thread failed");
        }
    }
}
