//! Which machines are protected, and how: the file that an operator writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::host::Totals;
use super::keep::Keep;
use super::policy::Target;
use crate::error::{Error, Result};
use crate::gc::retention::Policy;
use crate::vmm::agent::{Heartbeat, MonitorAt};

/// How long a guest may give no sign of life, where nothing is said.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(10);

/// What all machines of a host may lose together, where nothing is said.
const OVERHEAD_OF_HOST: f64 = 1.0;

/// A host's protected machines.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// The share of time that all machines may lose together: 0.2 is a fifth of one machine's.
    #[serde(default = "overhead_of_host")]
    pub overhead: f64,
    /// Bytes a second that may be stored for all machines together, such as `50MiB`.
    pub store_rate: Option<String>,
    /// Which epochs `prune` keeps of each machine, those included that are not named here.
    pub keep: Option<Keep>,
    #[serde(default)]
    pub machines: BTreeMap<String, MachineConfig>,
}

fn overhead_of_host() -> f64 {
    OVERHEAD_OF_HOST
}

fn one() -> f64 {
    1.0
}

/// One machine.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// The socket of QEMU's monitor, of Firecracker's API, or of Cloud Hypervisor's: one of them.
    pub qmp: Option<PathBuf>,
    pub firecracker: Option<PathBuf>,
    pub cloud_hypervisor: Option<PathBuf>,
    /// The stream that the state of the devices goes to; for Cloud Hypervisor the directory of its snapshot.
    pub state: Option<String>,
    /// At most so much work may be lost, such as `2s` or `500ms`.
    pub rpo: Option<String>,
    /// An epoch as often as this, whatever it costs.
    pub interval: Option<String>,
    /// The share of its time that a machine may lose.
    pub overhead: Option<f64>,
    /// How much more its work is worth than that of a machine with 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// Bytes a second that may be stored, such as `10MiB`.
    pub store_rate: Option<String>,
    /// A file that its guest changes, or the socket of an agent in it; and how long it may give no sign of life (10 s).
    pub heartbeat: Option<PathBuf>,
    pub heartbeat_limit: Option<String>,
    /// A command that holds back what it says to others until the epoch is durable that explains it.
    pub outputs: Option<String>,
    /// Which of its epochs `prune` keeps, in place of what is said for all machines.
    pub keep: Option<Keep>,
}

/// What an operator's file says.
pub fn read_file<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let is_missing = error.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io(format!("cannot read {}", path.display()), error);
        if is_missing {
            error.hint("write one, as the command's --help shows, or name it with --config")
        } else {
            error
        }
    })?;
    parse(&text).map_err(|error| error.context(path.display()))
}

impl Config {
    pub fn read(path: &Path) -> Result<Self> {
        read_file(path, Self::parse)
    }

    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| Error::usage(error.to_string()))?;
        check_share("overhead", config.overhead, 1000.0)?;
        config.totals()?;
        for (name, machine) in &config.machines {
            epochfs_format::check_machine(name)
                .map_err(|error| Error::usage(format!("[machines.{name:?}]: {error}")))?;
            if !machine.is_only_kept() {
                machine.target().map_err(|error| error.context(format!("[machines.{name}]")))?;
            }
            check_keep(&machine.keep, || format!("[machines.{name}.keep]"))?;
        }
        check_keep(&config.keep, || "[keep]".to_owned())?;
        Ok(config)
    }

    /// What all machines may take together.
    pub fn totals(&self) -> Result<Totals> {
        let store_rate = field("store-rate", &self.store_rate, parse_bytes)?;
        Ok(Totals { time: self.overhead, store_rate })
    }

    /// The machines that are protected, and not just named for what is kept of them.
    pub fn protected(&self) -> impl Iterator<Item = (&String, &MachineConfig)> {
        self.machines.iter().filter(|(_, machine)| !machine.is_only_kept())
    }

    /// Which epochs of a machine are kept, if that is said.
    pub fn retention(&self, machine: &str) -> Result<Option<Policy>> {
        let own = self.machines.get(machine).and_then(|machine| machine.keep.as_ref());
        own.or(self.keep.as_ref()).map(Keep::policy).transpose()
    }
}

impl MachineConfig {
    /// Whether it has a rule for `prune`, and no monitor: `epochfs run` protects it, or nobody does.
    fn is_only_kept(&self) -> bool {
        let has_monitor = self.qmp.is_some() || self.firecracker.is_some() || self.cloud_hypervisor.is_some();
        self.keep.is_some() && !has_monitor
    }

    pub fn monitor(&self) -> Result<MonitorAt> {
        match (&self.qmp, &self.firecracker, &self.cloud_hypervisor) {
            (Some(path), None, None) => Ok(MonitorAt::Qemu(path.clone())),
            (None, Some(path), None) => Ok(MonitorAt::Firecracker(path.clone())),
            (None, None, Some(path)) => Ok(MonitorAt::CloudHypervisor(path.clone())),
            _ => Err(Error::usage("a machine has one monitor")
                .hint("name its socket as qmp, as firecracker or as cloud-hypervisor")),
        }
    }

    /// Where its guest's signs of life are looked for, if that is wanted.
    pub fn heartbeat(&self) -> Result<Option<Heartbeat>> {
        let limit = field("heartbeat-limit", &self.heartbeat_limit, parse_duration)?.unwrap_or(HEARTBEAT_LIMIT);
        if self.heartbeat.is_none() && self.heartbeat_limit.is_some() {
            return Err(Error::usage("heartbeat-limit is given, and not where the guest's signs of life are")
                .hint("name a file that the guest changes, or its agent's socket, as heartbeat"));
        }
        Ok(self.heartbeat.as_deref().map(|path| Heartbeat::new(path, limit)))
    }

    pub fn state(&self) -> &str {
        let usual = if self.cloud_hypervisor.is_some() { "snapshot" } else { "vmstate" };
        self.state.as_deref().unwrap_or(usual)
    }

    pub fn target(&self) -> Result<Target> {
        if self.rpo.is_some() && self.interval.is_some() {
            return Err(Error::usage("rpo and interval do not go together")
                .hint("with rpo the interval is chosen; with interval it is fixed"));
        }
        if !(self.weight > 0.0 && self.weight.is_finite()) {
            return Err(Error::usage(format!("a weight is more than 0, not {}", self.weight)));
        }
        self.monitor()?;
        self.heartbeat()?;
        epochfs_format::check_stream_path(self.state().as_bytes())
            .map_err(|error| Error::usage(format!("state = {:?}: {error}", self.state())))?;
        if self.outputs.as_deref().is_some_and(|command| command.trim().is_empty()) {
            return Err(Error::usage("outputs names no command").hint("leave it out where nothing is held back"));
        }
        let default = Target::default();
        let overhead = self.overhead.unwrap_or(default.overhead);
        check_share("overhead", overhead, 1.0)?;
        let store_rate = field("store-rate", &self.store_rate, parse_bytes)?;
        let fixed = field("interval", &self.interval, parse_duration)?;
        Ok(Target { fixed, rpo: field("rpo", &self.rpo, parse_duration)?, overhead, store_rate })
    }
}

/// What a field says, if it is given.
fn field<T>(name: &str, text: &Option<String>, parse: impl FnOnce(&str) -> Result<T>) -> Result<Option<T>> {
    text.as_deref().map(parse).transpose().map_err(|error| error.context(name))
}

fn check_share(what: &str, share: f64, most: f64) -> Result<()> {
    match share > 0.0 && share <= most {
        true => Ok(()),
        false => Err(Error::usage(format!("{what} = {share} is no share of time")).hint("0.05 is 5 %")),
    }
}

/// A number and what is behind it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// A time such as `500ms`, `2s` or `1m`.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let seconds = split(text).and_then(|(number, unit)| match unit {
        "ms" => Some(number / 1000.0),
        "s" => Some(number),
        "m" | "min" => Some(number * 60.0),
        "h" => Some(number * 3600.0),
        _ => None,
    });
    seconds
        .filter(|seconds| *seconds >= 0.001 && *seconds <= 30.0 * 86400.0)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Error::usage(format!("{text:?} is no time")).hint("write 500ms, 2s, 1m or 1h"))
}

/// Bytes such as `10MiB`.
pub(super) fn parse_bytes(text: &str) -> Result<u64> {
    let bytes = split(text).and_then(|(number, unit)| match unit {
        "" | "B" => Some(number),
        "KiB" | "K" => Some(number * 1024.0),
        "MiB" | "M" => Some(number * 1024.0 * 1024.0),
        "GiB" | "G" => Some(number * 1024.0 * 1024.0 * 1024.0),
        _ => None,
    });
    bytes
        .filter(|bytes| *bytes >= 1.0)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| Error::usage(format!("{text:?} is no number of bytes")).hint("write 500KiB, 10MiB or 1GiB"))
}

fn check_keep(keep: &Option<Keep>, table: impl FnOnce() -> String) -> Result<()> {
    match keep.as_ref().map(Keep::policy) {
        Some(Err(error)) => Err(error.context(table())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_understood() {
        let config = Config::parse(
            "overhead = 0.2\nstore-rate = \"50MiB\"\n[machines.web1]\nqmp = \"/run/web1.qmp\"\nrpo = \"500ms\"\noverhead = 0.1\nweight = 4.0\nstore-rate = \"10MiB\"\n[machines.db]\nqmp = \"/run/db.qmp\"\ninterval = \"1.5s\"\n",
        )
        .unwrap();
        assert_eq!(config.totals().unwrap(), Totals { time: 0.2, store_rate: Some(50 << 20) });
        assert_eq!(config.machines.len(), 2);
        let expected =
            Target { fixed: None, rpo: Some(Duration::from_millis(500)), overhead: 0.1, store_rate: Some(10 << 20) };
        assert_eq!(config.machines["web1"].target().unwrap(), expected);
        let db = config.machines["db"].target().unwrap();
        assert_eq!((db.fixed, db.overhead), (Some(Duration::from_millis(1500)), 0.05));
        assert_eq!(config.machines["db"].state(), "vmstate");
        assert!(Config::parse("").unwrap().machines.is_empty());
        let kept = Config::parse("[machines.web1]\nkeep = { last = 3 }\n[machines.web2]\nqmp = \"/run/web2\"").unwrap();
        assert_eq!(kept.protected().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["web2"]);
        assert!(kept.retention("web1").unwrap().is_some());
    }

    #[test]
    fn what_is_kept_is_said_for_all_machines_and_for_one() {
        let config = Config::parse(
            "[keep]\nlast = 3\nwithin = \"36h\"\n[machines.web1]\nqmp = \"/x\"\n[machines.db]\nqmp = \"/y\"\nkeep = { hourly = 24, daily = 7 }\n",
        )
        .unwrap();
        let of_all = config.retention("web1").unwrap().unwrap();
        assert_eq!((of_all.last, of_all.within), (3, Some(Duration::from_secs(36 * 3600))));
        assert_eq!(config.retention("not named").unwrap(), Some(of_all));
        let db = config.retention("db").unwrap().unwrap();
        assert_eq!((db.last, db.within, db.periods.values().sum::<u64>()), (0, None, 31));
        assert_eq!(Config::parse("").unwrap().retention("web1").unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let machine = "[machines.web1]\nqmp = \"/x\"\n";
        for (text, part) in [
            ("overhed = 1".to_owned(), "overhed"),
            ("overhead = 0".to_owned(), "no share"),
            ("store-rate = \"much\"".to_owned(), "much"),
            ("[machines.web1]".to_owned(), "one monitor"),
            (format!("{machine}firecracker = \"/y\""), "one monitor"),
            ("[machines.\"a/b\"]\nqmp = \"/x\"".to_owned(), "a/b"),
            (format!("{machine}rpo = \"2\""), "web1"),
            (format!("{machine}rpo = \"2s\"\ninterval = \"1s\""), "do not go together"),
            (format!("{machine}overhead = 1.5"), "no share"),
            (format!("{machine}weight = 0.0"), "weight"),
            (format!("{machine}store-rate = \"fast\""), "fast"),
            (format!("{machine}state = \"../x\""), "../x"),
            ("[keep]".to_owned(), "[keep]"),
            ("[keep]\nhourly = 0".to_owned(), "no rule"),
            ("[keep]\nfortnightly = 1".to_owned(), "fortnightly"),
            ("[keep]\nlast = -1".to_owned(), "last"),
            ("[keep]\nwithin = \"1 moon\"".to_owned(), "1 moon"),
            (format!("{machine}keep = {{}}"), "[machines.web1.keep]"),
        ] {
            let error = Config::parse(&text).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn times_are_understood() {
        for (text, ms) in [("500ms", 500), ("2s", 2000), ("1.5s", 1500), (" 1 m ", 60_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "1", "s", "-1s", "1e3s", "0s", "0.1ms", "1d", "99999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
