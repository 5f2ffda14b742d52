//! What really goes over the network: every request with its size and its outcome, those that are repeated included.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

use serde::{Deserialize, Serialize};

use super::TRY_WAIT;
use super::uploads::Uploads;
use crate::platform::clock;
use crate::platform::lock::lock;
use crate::platform::store::remote::{innermost, is_about_trust};

/// Counts of requests, and whether the service answers.
#[derive(Debug, Default)]
pub struct Traffic {
    reads: AtomicU64,
    writes: AtomicU64,
    lists: AtomicU64,
    deletes: AtomicU64,
    failures: AtomicU64,
    answered: AtomicU64,
    reach: Mutex<Reach>,
}

/// The counts at some time. Each is of requests as the service sees them, and may charge for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficTotals {
    pub reads: u64,
    pub writes: u64,
    pub lists: u64,
    pub deletes: u64,
    /// Of them all, those without an answer, and those that the service was too busy or too broken for.
    pub failures: u64,
}

/// Whether the service answers.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Since when no request has been served, if the last ones were not.
    pub unreachable_since_ns: Option<u64>,
    pub last_failure: Option<String>,
}

impl Traffic {
    pub fn totals(&self) -> TrafficTotals {
        TrafficTotals {
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            lists: self.lists.load(Relaxed),
            deletes: self.deletes.load(Relaxed),
            failures: self.failures.load(Relaxed),
        }
    }

    pub fn reach(&self) -> Reach {
        lock(&self.reach).clone()
    }

    /// How many requests were answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Relaxed)
    }

    /// Nothing was answered for as long as anybody waits.
    pub fn note_silence(&self, waited: Duration) {
        let mut reach = lock(&self.reach);
        reach.unreachable_since_ns.get_or_insert_with(|| clock::now_ns().saturating_sub(waited.as_nanos() as u64));
        reach.last_failure.get_or_insert_with(|| format!("no answer within {} s", waited.as_secs()));
    }

    /// A client that is counted here.
    pub(super) fn connector(self: &Arc<Self>) -> Connector {
        Connector { traffic: self.clone() }
    }

    fn count(&self, request: &HttpRequest) {
        let is_listing =
            || request.uri().query().is_some_and(|query| query.contains("list-type=") || query.contains("comp=list"));
        let counter = match request.method().as_str() {
            "GET" if is_listing() => &self.lists,
            "GET" | "HEAD" => &self.reads,
            "DELETE" => &self.deletes,
            _ => &self.writes,
        };
        counter.fetch_add(1, Relaxed);
    }

    fn note(&self, failure: Option<String>) {
        let mut reach = lock(&self.reach);
        match failure {
            None => {
                self.answered.fetch_add(1, Relaxed);
                reach.unreachable_since_ns = None;
            }
            Some(failure) => {
                self.failures.fetch_add(1, Relaxed);
                reach.unreachable_since_ns.get_or_insert_with(clock::now_ns);
                reach.last_failure = Some(failure);
            }
        }
    }
}

/// Makes clients whose requests are counted.
#[derive(Debug)]
pub(super) struct Connector {
    traffic: Arc<Traffic>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let uploads = Uploads::connect(options, TRY_WAIT)?;
        Ok(HttpClient::new(Counted { inner, uploads, traffic: self.traffic.clone() }))
    }
}

#[derive(Debug)]
struct Counted {
    inner: HttpClient,
    uploads: Uploads,
    traffic: Arc<Traffic>,
}

#[async_trait]
impl HttpService for Counted {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.traffic.count(&request);
        let result = match Uploads::is_large(&request) {
            true => self.uploads.execute(request).await,
            false => self.inner.execute(request).await,
        };
        self.traffic.note(match &result {
            // Whoever is not let in was answered all the same.
            Ok(response) if response.status().is_server_error() => Some(format!("it answers {}", response.status())),
            Ok(_) => None,
            Err(error) => Some(innermost(error)),
        });
        match result {
            Err(error) if is_about_trust(&innermost(&error)) => Err(HttpError::new(HttpErrorKind::Unknown, error)),
            result => result,
        }
    }
}
