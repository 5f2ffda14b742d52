//! Whether a machine stands still because an agent stopped it: only such a one is let go on, and what others stopped is theirs.

use std::path::Path;

use super::base::Base;
use super::guard::{named, peer_of};
use super::{Health, machine_of};
use crate::error::{Error, Kind, Result};

/// The same of a monitor that takes several clients.
pub struct Stopped {
    /// For the next agent, where this one dies.
    note: Base,
    /// The process that this agent has stopped, and does not know to have gone on.
    process: Option<i32>,
}

impl Stopped {
    pub fn of(notes: &Path, live: &Path) -> Self {
        Self { note: Base::of_stopped(notes, &machine_of(live)), process: None }
    }

    /// The machine behind this socket, of which `health` was told just now, is about to be stopped.
    pub fn begin(&mut self, socket: &Path, health: Health) -> Result<()> {
        match health {
            Health::Running => {}
            Health::Idle(state) => return Err(others_stopped(&state)),
            Health::Lost(why) => return Err(Error::new(Kind::Io, why)),
        }
        let peer = peer_of(socket)?;
        // Of one that cannot be named, because not everybody may look, only this agent knows.
        if let Ok(process) = named(&peer) {
            self.note.note_process(&process, None)?;
        }
        self.process = Some(peer.pid());
        Ok(())
    }

    /// Whether this agent may have stopped it since it was known to run.
    fn has_begun(&self) -> bool {
        self.process.is_some()
    }

    /// Lets it go on, if it was stopped. Says first whether it stood still until now.
    pub fn resume(
        &self,
        see: impl FnOnce() -> Result<Health>,
        stood_still: &mut bool,
        go_on: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.has_begun() {
            return Ok(());
        }
        match see()? {
            Health::Running => return Ok(()),
            Health::Idle(_) => *stood_still = true,
            Health::Lost(_) => {}
        }
        go_on()
    }

    /// Whether it is known after a capture that it goes on.
    pub fn settle(&mut self, goes_on: bool) {
        if goes_on {
            self.end();
        }
    }

    /// Lets the machine go on that was seen to stand still, if an agent stopped it.
    pub fn let_go_on(&mut self, socket: &Path, seen: Health, go_on: impl FnOnce() -> Result<()>) -> Result<Health> {
        match seen {
            Health::Running if self.has_begun() => {}
            Health::Idle(_) if self.is(socket) => {
                tracing::warn!(monitor = %socket.display(), "a capture of the machine broke off: it goes on");
                go_on()?;
            }
            seen => return Ok(seen),
        }
        self.end();
        Ok(Health::Running)
    }

    /// Whether the machine behind this socket was stopped by an agent, this one or one before it.
    fn is(&self, socket: &Path) -> bool {
        (self.has_begun() || self.note.file().exists())
            && peer_of(socket).is_ok_and(|peer| {
                self.process == Some(peer.pid()) || named(&peer).is_ok_and(|process| self.note.is_of_process(&process))
            })
    }

    /// It runs.
    fn end(&mut self) {
        self.process = None;
        if let Err(error) = self.note.forget() {
            tracing::warn!("a machine that somebody else stops may be let go on: {error}");
        }
    }
}

/// The error of a capture that found the machine so.
pub fn others_stopped(state: &str) -> Error {
    Error::conflict(format!("the machine is {state:?}: somebody else stopped it just now, or migrates it"))
        .hint("it is captured again when it runs")
}
