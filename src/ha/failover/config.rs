//! The operator's file: what machines take of a host, where they may be, and how each kind of monitor is started.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::executor::Limits;
use crate::error::{Error, Result};
use crate::ha::config::{parse_bytes, parse_duration, read_file};
use crate::ha::plan::{Need, Settings, location_of};

/// What a machine takes where nothing is said and its epoch does not tell.
const CPUS: u32 = 1;

/// All machines that may be started elsewhere.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct FailoverConfig {
    /// How many machines' storage is attached at once, and how many are started at once.
    pub attach_at_once: Option<usize>,
    pub start_at_once: Option<usize>,
    /// How long a machine may take before that is said.
    pub budget: Option<String>,
    pub planner: Settings,
    /// What is so for all machines, unless one says otherwise.
    pub defaults: MachineRules,
    pub machines: BTreeMap<String, MachineRules>,
}

/// One machine.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineRules {
    /// What it takes of a host: as long as its memory is, unless it is said.
    pub memory: Option<String>,
    pub cpus: Option<u32>,
    /// What its processors must have: what those of the host had that ran it, unless it is said.
    pub cpu_features: Option<BTreeSet<String>>,
    pub priority: Option<i32>,
    /// Machines that must have been started before it.
    pub after: Option<Vec<String>>,
    /// Groups of which no two machines may be on one host.
    pub apart: Option<BTreeSet<String>>,
    /// Where it may be, and where it had better be: `zone1/rack4`.
    pub allowed: Option<Vec<String>>,
    pub preferred: Option<Vec<String>>,
    /// Hosts on which what it needs first is kept at hand, epoch after epoch: by name or id.
    pub warm: Option<BTreeSet<String>>,
    /// Whether it runs on its files on the mount, and not on an epoch's.
    pub live: Option<bool>,
    /// The command that starts it, and ends with 0 when it runs.
    pub start: Option<Vec<String>>,
    /// What `epochfs protect` is given for it, behind its name; nothing where the command does that itself.
    pub protect: Option<Vec<String>>,
    /// Whether it is started again on its own host when it dies there alone.
    pub restart: Option<bool>,
    /// The streams of its memory and of the state of its devices.
    pub memory_stream: Option<String>,
    pub state_stream: Option<String>,
}

impl FailoverConfig {
    pub fn read(path: &Path) -> Result<Self> {
        read_file(path, Self::parse)
    }

    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| Error::usage(error.to_string()))?;
        config.limits()?;
        for name in config.machines.keys() {
            epochfs_format::check_machine(name)
                .map_err(|error| Error::usage(format!("[machines.{name:?}]: {error}")))?;
            config.of(name).check().map_err(|error| error.context(format!("[machines.{name}]")))?;
        }
        config.defaults.check().map_err(|error| error.context("[defaults]"))?;
        Ok(config)
    }

    pub fn limits(&self) -> Result<Limits> {
        let usual = Limits::default();
        let count = |given: Option<usize>, usual: usize, name: &str| match given {
            Some(0) => Err(Error::usage(format!("{name} = 0: nothing would be started")).hint("give at least 1")),
            given => Ok(given.unwrap_or(usual)),
        };
        Ok(Limits {
            attach_at_once: count(self.attach_at_once, usual.attach_at_once, "attach-at-once")?,
            start_at_once: count(self.start_at_once, usual.start_at_once, "start-at-once")?,
            budget: self.budget.as_deref().map_or(Ok(usual.budget), parse_duration)?,
        })
    }

    /// What is so for a machine.
    pub fn of(&self, machine: &str) -> MachineRules {
        let own = self.machines.get(machine).cloned().unwrap_or_default();
        own.or(&self.defaults)
    }

    /// What a machine needs of a host. `memory` is how long its memory is in its epoch, and `features` what the processors
    /// of the host had that ran it.
    pub fn need(&self, machine: &str, epoch: u64, memory: u64, features: &BTreeSet<String>) -> Result<Need> {
        let rules = self.of(machine);
        let places = |places: &Option<Vec<String>>| places.iter().flatten().map(|place| location_of(place)).collect();
        Ok(Need {
            machine: machine.to_owned(),
            epoch,
            memory: rules.memory.as_deref().map_or(Ok(memory), parse_bytes)?,
            cpus: rules.cpus(),
            cpu_features: rules.cpu_features.clone().unwrap_or_else(|| features.clone()),
            priority: rules.priority.unwrap_or_default(),
            after: rules.after.clone().unwrap_or_default(),
            apart: rules.apart.clone().unwrap_or_default(),
            allowed: places(&rules.allowed),
            preferred: places(&rules.preferred),
            image_bytes: memory,
        })
    }
}

impl MachineRules {
    fn or(self, other: &Self) -> Self {
        let other = other.clone();
        Self {
            memory: self.memory.or(other.memory),
            cpus: self.cpus.or(other.cpus),
            cpu_features: self.cpu_features.or(other.cpu_features),
            priority: self.priority.or(other.priority),
            after: self.after.or(other.after),
            apart: self.apart.or(other.apart),
            allowed: self.allowed.or(other.allowed),
            preferred: self.preferred.or(other.preferred),
            warm: self.warm.or(other.warm),
            live: self.live.or(other.live),
            start: self.start.or(other.start),
            protect: self.protect.or(other.protect),
            restart: self.restart.or(other.restart),
            memory_stream: self.memory_stream.or(other.memory_stream),
            state_stream: self.state_stream.or(other.state_stream),
        }
    }

    fn check(&self) -> Result<()> {
        self.memory.as_deref().map(parse_bytes).transpose()?;
        for (name, command) in [("start", &self.start), ("protect", &self.protect)] {
            let values = Values::default();
            command.iter().flatten().try_for_each(|word| values.put(word).map(|_| ()))?;
            if command.as_ref().is_some_and(|command| name == "start" && command.is_empty()) {
                return Err(Error::usage("start = [] starts nothing").hint("give the program and its arguments"));
            }
        }
        Ok(())
    }

    pub fn cpus(&self) -> u32 {
        self.cpus.unwrap_or(CPUS)
    }

    pub fn is_live(&self) -> bool {
        self.live.unwrap_or_default()
    }

    pub fn is_restarted(&self) -> bool {
        self.restart.unwrap_or_default()
    }

    pub fn memory_stream(&self) -> &str {
        self.memory_stream.as_deref().unwrap_or("memory")
    }

    pub fn state_stream(&self) -> &str {
        self.state_stream.as_deref().unwrap_or("vmstate")
    }
}

/// What the placeholders of a command stand for.
#[derive(Clone, Debug, Default)]
pub struct Values {
    pub machine: String,
    pub epoch: String,
    /// The directory that the machine runs on: its live, or its epoch's.
    pub directory: String,
    pub live: String,
    pub mount: String,
    pub memory: String,
    pub vmstate: String,
    pub program: String,
    pub repo: String,
    pub state_dir: String,
}

impl Values {
    /// A word with its placeholders replaced. Braces that hold something else stay as they are, unless that is one word.
    pub fn put(&self, word: &str) -> Result<String> {
        let mut out = String::new();
        let mut rest = word;
        while let Some((before, behind)) = rest.split_once('{') {
            out += before;
            let Some((name, behind)) = behind.split_once('}') else {
                out.push('{');
                rest = behind;
                continue;
            };
            match self.get(name) {
                Some(value) => out += value,
                None if name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_') => {
                    return Err(Error::usage(format!("{{{name}}} in {word:?} stands for nothing")).hint(
                        "there are {machine} {epoch} {directory} {live} {mount} {memory} {vmstate} {program} {repo} {state_dir}",
                    ));
                }
                None => out += &format!("{{{name}}}"),
            }
            rest = behind;
        }
        Ok(out + rest)
    }

    fn get(&self, name: &str) -> Option<&str> {
        Some(match name {
            "machine" => &self.machine,
            "epoch" => &self.epoch,
            "directory" => &self.directory,
            "live" => &self.live,
            "mount" => &self.mount,
            "memory" => &self.memory,
            "vmstate" => &self.vmstate,
            "program" => &self.program,
            "repo" => &self.repo,
            "state_dir" => &self.state_dir,
            _ => return None,
        })
    }
}

/// How long a machine may take, unless it is said.
pub(super) const BUDGET: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_as_its_own_table_says_and_else_as_the_defaults_do() {
        let config = FailoverConfig::parse(
            "attach-at-once = 3\nbudget = \"2s\"\n[defaults]\ncpus = 2\nstart = [\"{program}\", \"run\", \"--from\", \"{machine}\"]\n\
             [machines.web1]\npriority = 5\nmemory = \"1GiB\"\nallowed = [\"zone1/rack4\"]\napart = [\"web\"]\n",
        )
        .unwrap();
        let limits = config.limits().unwrap();
        assert_eq!((limits.attach_at_once, limits.start_at_once, limits.budget), (3, 8, Duration::from_secs(2)));
        let features: BTreeSet<String> = ["avx2".to_owned()].into();
        let need = config.need("web1", 7, 5 << 20, &features).unwrap();
        assert_eq!((need.memory, need.cpus, need.priority, need.epoch), (1 << 30, 2, 5, 7));
        assert_eq!(need.allowed, [["zone1".to_owned(), "rack4".to_owned()]]);
        assert_eq!(need.cpu_features, features);
        let other = config.need("db", 1, 5 << 20, &features).unwrap();
        assert_eq!((other.memory, other.priority), (5 << 20, 0));
        assert_eq!(config.of("db").start.unwrap().len(), 4);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("attach-at-once = 0", "attach-at-once"),
            ("budget = \"soon\"", "soon"),
            ("colour = 1", "colour"),
            ("[defaults]\nstart = []", "starts nothing"),
            ("[machines.web1]\nstart = [\"qemu\", \"{epoc}\"]", "{epoc}"),
            ("[machines.web1]\nmemory = \"much\"", "web1"),
            ("[machines.\"a/b\"]\ncpus = 1", "a/b"),
        ] {
            let error = FailoverConfig::parse(text).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn placeholders_are_replaced_and_other_braces_left_alone() {
        let values = Values { machine: "web1".into(), epoch: "7".into(), ..Values::default() };
        assert_eq!(values.put("{machine}@{epoch}").unwrap(), "web1@7");
        assert_eq!(values.put("{\"id\": 1} {machine").unwrap(), "{\"id\": 1} {machine");
        assert!(values.put("{nothing}").is_err());
    }
}
