//! Becoming a machine's owner: with the first change, by taking it over, and again in a new term; and giving it up.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::journal::Journal;
use super::refusal::{Answer, Refusal};
use super::{Halt, Live, ROOT, directory_of};
use crate::epoch::admin::{Ownership, TermTry};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

impl Live {
    pub(super) fn become_owner(&self) -> Answer<()> {
        self.become_owner_by(&|| self.store.own(&self.machine, self.settings.host.clone(), false))
    }

    fn become_owner_by(&self, own: &dyn Fn() -> Result<Ownership>) -> Answer<()> {
        let mut ownership = lock(&self.ownership);
        if self.owned.load(Ordering::Acquire) {
            return Ok(());
        }
        if ownership.is_none() {
            match own() {
                Ok(owned) => {
                    self.term.store(owned.term, Ordering::Release);
                    *ownership = Some(owned);
                }
                Err(error) if error.kind() == Kind::Conflict => {
                    tracing::warn!(machine = %self.machine, "live is read-only: {error}");
                    *self.halt.write().unwrap_or_else(PoisonError::into_inner) = Some(Halt::Foreign(error.to_string()));
                    return Err(Refusal::ReadOnly);
                }
                Err(error) => return Err(error.into()),
            }
            *self.halt.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        // Nobody else commits from here on; somebody may have until now.
        if self.spool.get().is_none() {
            self.take_newest()?;
            let directory = directory_of(&self.settings, &self.machine);
            let (journal, spool) =
                Journal::create(self.settings.files.clone(), &directory, self.settings.budget.clone())?;
            *lock(&self.journal) = Some(journal);
            let _ = self.spool.set(spool);
        }
        drop(ownership);
        self.rewrite_journal()?;
        self.owned.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes the machine over, in which this term is in force. Nothing of an earlier term may be kept here.
    pub fn take_over(&self, term: u64) -> Result<Ownership> {
        let own = || self.take_term(term);
        self.become_owner_by(&own)
            .map_err(|refusal| if self.halt().is_some() { self.halted() } else { refusal.into() })?;
        self.owned_since(Duration::ZERO)
    }

    /// The ownership, in a term that was asked for at `since` or later, by this host's clock: a new one if need be.
    pub fn owned_since(&self, since: Duration) -> Result<Ownership> {
        self.begin_change().map_err(|refusal| if self.halt().is_some() { self.halted() } else { refusal.into() })?;
        let (held, is_new) = {
            let mut ownership = lock(&self.ownership);
            let mut is_new = false;
            loop {
                let Some(held) = ownership.as_ref() else {
                    return Err(Error::conflict(format!("{} was just given up here", self.machine)).hint("repeat it"));
                };
                if held.since >= since {
                    break (held.clone(), is_new);
                }
                match self.take_term(held.term) {
                    // One that was asked for earlier may have arrived only now.
                    Ok(renewed) => {
                        self.term.store(renewed.term, Ordering::Release);
                        (*ownership, is_new) = (Some(renewed), true);
                    }
                    Err(error) if error.kind() == Kind::Conflict => {
                        tracing::error!(machine = %self.machine, "live is read-only: {error}");
                        self.halt_with(Halt::Fenced);
                        return Err(self.halted());
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        if is_new {
            self.rewrite_journal()?;
        }
        Ok(held)
    }

    /// Ends this term by one of this host. Where it is not known what came of it, it is the same that is tried again.
    fn take_term(&self, over: u64) -> Result<Ownership> {
        let mut taking = lock(&self.taking);
        let by = taking.take().filter(|by| by.is_over(over)).unwrap_or_else(|| TermTry::new(over));
        let taken = self.store.take_over_by(&self.machine, self.settings.host.clone(), &by);
        if taken.as_ref().is_err_and(|error| error.kind() != Kind::Conflict) {
            *taking = Some(by);
        }
        taken
    }

    /// Whether this host's term is another than it was, once nobody is just taking one, and what arrived late is known.
    pub(super) fn has_another_term(&self, before: Option<u64>) -> Result<bool> {
        let has_arrived = {
            let mut ownership = lock(&self.ownership);
            let mut taking = lock(&self.taking);
            let arrived = match taking.as_ref() {
                Some(by) if self.term() == before => self.store.arrived_by(&self.machine, by)?,
                _ => None,
            };
            if let Some(arrived) = &arrived {
                self.term.store(arrived.term, Ordering::Release);
                (*ownership, *taking) = (Some(arrived.clone()), None);
            }
            arrived.is_some()
        };
        if has_arrived {
            self.rewrite_journal()?;
        }
        Ok(self.term() != before)
    }

    /// Gives up the machine, which must be without files. Whatever else becomes of it, the live takes nothing any more.
    pub fn discard(&self) -> Answer<()> {
        {
            let tree = self.exclusive();
            if !tree.entries(ROOT)?.is_empty() {
                return Err(Refusal::NotEmpty);
            }
            self.closed.store(true, Ordering::Release);
        }
        self.end_commits();
        if !self.owned.load(Ordering::Acquire) || self.halt().is_some() {
            return Ok(());
        }
        Ok(self.give_up()?)
    }

    /// Gives up what is kept of a machine that was removed, whatever it is.
    pub fn forget(&self) -> Result<()> {
        {
            let _tree = self.exclusive();
            self.closed.store(true, Ordering::Release);
        }
        self.end_commits();
        self.give_up()
    }
}
