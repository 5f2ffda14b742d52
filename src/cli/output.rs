//! Printing: tables, sizes, times, errors.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};
use crate::platform::clock;

/// Sends logs to stderr: warnings, or what EPOCHFS_LOG or the flags ask for.
pub fn start_logging(verbose: u8, quiet: bool) {
    let default = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "info,epochfs=debug",
    };
    let filter = EnvFilter::try_from_env("EPOCHFS_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // A second call, as in tests, keeps the first one's settings.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lossy)
        // It would be told on standard error, which is what failed.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

/// Standard error, where there is nobody to tell that it cannot be written: a log on a full disk ends nothing.
struct Lossy;

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = std::io::stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Writes to stdout. A reader that went away is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Error::io("cannot write to standard output", error)),
    }
}

pub fn notice(text: &str) {
    // Without stderr there is nobody to tell.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints an error on stderr, and as JSON on stdout where that was asked for.
pub fn print_error(error: &Error, as_json: bool) {
    notice(&format!("epochfs: {error}"));
    if let Some(next) = error.next_step() {
        notice(&format!("  next: {next}"));
    }
    if as_json {
        let document = json!({"error": {
            "kind": error.kind().name(),
            "message": error.to_string(),
            "next_step": error.next_step(),
            "exit_code": error.exit_code(),
        }});
        // The error that matters was printed already.
        let _ = print(&format!("{document:#}\n"));
    }
}

/// A table: left-aligned text columns, right-aligned numbers (whose headings begin with '>').
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headings[column].trim_start_matches('>').chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut out = String::new();
    let names: Vec<String> = headings.iter().map(|heading| heading.trim_start_matches('>').to_uppercase()).collect();
    for row in std::iter::once(&names).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let right = headings[column].starts_with('>');
            line += &if right { format!("{pad}{cell}  ") } else { format!("{cell}{pad}  ") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Reads a machine's name, where none of its epochs is meant.
pub fn parse_machine(text: &str) -> std::result::Result<String, String> {
    match (epochfs_format::check_machine(text), text.split_once('@')) {
        (Ok(()), _) => Ok(text.to_owned()),
        (Err(_), Some((machine, _))) => Err(format!("this is about machines, not epochs: give {machine:?}")),
        (Err(error), None) => Err(error.to_string()),
    }
}

/// Reads a size: a number of bytes, or of KiB, MiB, GiB or TiB behind which stands K, M, G or T.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err("a size is a number with K, M, G, T or nothing behind it, like 64G".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "a size is a whole number, like 64G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "this size is too large".to_owned())
}

/// A time in UTC, like 2026-03-01 12:30:05.
pub fn time(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The civil date of a day number, counted in 400-year eras that begin in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// Somebody's text without what could control a terminal; lines stay lines.
pub fn plain(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control() || *letter == '\n').collect()
}

/// A stream's name: as it is where that is plain text, with escapes where it is not.
pub fn name(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}

/// A stream's name in JSON: the text, and the bytes too where it is not text.
pub fn name_json(path: &[u8]) -> Value {
    match std::str::from_utf8(path) {
        Ok(text) => json!(text),
        Err(_) => json!({"bytes": path}),
    }
}

/// Reads a time: a number with ms, s, m or h behind it.
pub fn parse_time(text: &str) -> std::result::Result<Duration, String> {
    const UNITS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
    clock::parse(text, UNITS)
        .ok_or_else(|| "a time is a whole number with ms, s, m or h behind it, like 100ms".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(1_709_210_096_000_000_000), "2024-02-29 12:34:56");
        assert_eq!(time(4_107_542_399_000_000_000), "2100-02-28 23:59:59");
        assert_eq!((size(1023), size(1024), size(u64::MAX)), ("1023 B".into(), "1.0 KiB".into(), "16.0 EiB".into()));
    }

    #[test]
    fn a_machine_is_no_epoch() {
        assert_eq!(parse_machine("web-1"), Ok("web-1".into()));
        assert!(parse_machine("web1@11").unwrap_err().ends_with("give \"web1\""));
        assert!(parse_machine("").is_err());
    }

    #[test]
    fn sizes_are_understood() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64K", 65536), ("1m", 1 << 20), ("2GiB", 2 << 30), ("1TB", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1 G", "1X", "16777216T", "1GG", "0x10"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["web1".to_owned(), "7".to_owned()], vec!["a".to_owned(), "12345".to_owned()]];
        assert_eq!(table(&["machine", ">pages"], &rows), "MACHINE  PAGES\nweb1         7\na        12345\n");
    }

    #[test]
    fn times_are_understood() {
        for (text, ms) in [("100ms", 100), ("2s", 2000), ("1m", 60_000), ("3h", 10_800_000)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "1", "s", "-1s", "1.5s", "1 s", "18446744073709551615h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
