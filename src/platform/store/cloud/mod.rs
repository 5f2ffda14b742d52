//! Connecting to a bucket: settings and credentials from the environment and the files that the service's own tools
//! use, never from the command line, and never told to anybody.

mod profile;
mod traffic;
mod uploads;
mod variables;

use std::sync::{Arc, Once};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};

use self::profile::Profile;
pub use self::traffic::{Reach, Traffic, TrafficTotals};
pub(super) use self::uploads::UPLOAD_WAIT_MAX;
pub use self::variables::Variables;
use super::RemoteStore;
use super::location::{BucketUrl, Service};
use super::remote::{ANSWER_WAIT, Patience};
use crate::error::{Error, Result};

/// How long a connection may take to come about.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// How long one try may take to be answered, and each further part of an answer.
const TRY_WAIT: Duration = Duration::from_secs(10);

/// Pauses between tries: they grow to the longer one, and are drawn at random.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(3));

/// The variable that says for how many seconds a store that does not answer is asked again.
const PATIENCE_VARIABLE: &str = "EPOCHFS_STORE_TIMEOUT";

/// Connects to a bucket. Nothing is sent before the store is used.
pub fn connect(url: &BucketUrl, variables: &Variables) -> Result<RemoteStore> {
    use_ring();
    let patience = patience(variables)?;
    let traffic = Arc::new(Traffic::default());
    let remote: Arc<dyn ObjectStore> = match url.service {
        Service::S3 => Arc::new(s3(url, variables, &traffic, patience)?),
        Service::GoogleCloud => Arc::new(
            variables
                .configure(GoogleCloudStorageBuilder::new(), "GOOGLE_", GoogleCloudStorageBuilder::with_config)
                .with_bucket_name(&url.bucket)
                .with_retry(retries(patience))
                .with_client_options(client_options(false, variables)?)
                .with_http_connector(traffic.connector())
                .build()
                .map_err(|error| unfit(url, &error))?,
        ),
        Service::Azure => Arc::new(
            variables
                .configure(MicrosoftAzureBuilder::new(), "AZURE_", MicrosoftAzureBuilder::with_config)
                .with_container_name(&url.bucket)
                .with_retry(retries(patience))
                .with_client_options(client_options(false, variables)?)
                .with_http_connector(traffic.connector())
                .build()
                .map_err(|error| unfit(url, &error))?,
        ),
    };
    let remote: Arc<dyn ObjectStore> = if url.prefix.is_empty() {
        remote
    } else {
        let prefix = Path::parse(&url.prefix).map_err(|error| Error::usage(format!("{url}: {error}")))?;
        Arc::new(PrefixStore::new(remote, prefix))
    };
    RemoteStore::with(remote, url.to_string(), Patience::of(patience), Some(traffic))
}

/// TLS comes without a choice of its cryptography; this is ours.
fn use_ring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An embedding program may have chosen another, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

fn patience(variables: &Variables) -> Result<Duration> {
    let Some(text) = variables.get(PATIENCE_VARIABLE) else { return Ok(ANSWER_WAIT) };
    match text.parse() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err(Error::usage(format!("{PATIENCE_VARIABLE} is {text:?}: it takes seconds, from 1 to 3600"))),
    }
}

fn retries(patience: Duration) -> RetryConfig {
    let init_backoff = PAUSES.0;
    let max_backoff = PAUSES.1.min(patience / 8);
    RetryConfig {
        backoff: BackoffConfig { init_backoff, max_backoff, base: 2.0 },
        max_retries: 100,
        retry_timeout: patience,
    }
}

fn client_options(is_plain: bool, variables: &Variables) -> Result<ClientOptions> {
    let mut options = ClientOptions::new()
        .with_allow_http(is_plain)
        .with_connect_timeout(CONNECT_WAIT)
        .with_read_timeout(TRY_WAIT)
        .with_timeout_disabled()
        .with_pool_idle_timeout(Duration::from_secs(60));
    if let Some(path) = variables.get("AWS_CA_BUNDLE") {
        let pem = std::fs::read(path)
            .map_err(|error| Error::io(format!("cannot read {path}, which AWS_CA_BUNDLE names"), error))?;
        let certificates = Certificate::from_pem_bundle(&pem)
            .map_err(|error| Error::usage(format!("{path}, which AWS_CA_BUNDLE names: {error}")))?;
        for certificate in certificates {
            options = options.with_root_certificate(certificate);
        }
    }
    Ok(options)
}

fn unfit(url: &BucketUrl, error: &object_store::Error) -> Error {
    Error::usage(format!("{url}: {error}")).hint("check the variables that say how to reach the service")
}

/// The variables of which one says where credentials come from, if none are given outright.
const OTHER_CREDENTIALS: [&str; 5] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
];

fn s3(
    url: &BucketUrl,
    variables: &Variables,
    traffic: &Arc<Traffic>,
    patience: Duration,
) -> Result<object_store::aws::AmazonS3> {
    let profile = Profile::read(variables)?;
    let mut builder =
        variables.configure(AmazonS3Builder::new(), "AWS_", AmazonS3Builder::with_config).with_bucket_name(&url.bucket);
    let is_set = |names: &[&str]| names.iter().any(|name| variables.get(name).is_some());
    if !is_set(&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]) && !is_set(&OTHER_CREDENTIALS) {
        match (profile.get("aws_access_key_id"), profile.get("aws_secret_access_key")) {
            (Some(id), Some(secret)) => {
                builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                if let Some(token) = profile.get("aws_session_token") {
                    builder = builder.with_token(token);
                }
            }
            _ => {
                return Err(Error::usage(format!("there are no credentials for {url}")).hint(
                    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or keep them in ~/.aws/credentials (AWS_PROFILE \
                     names a profile); for the role of an EC2 instance, set AWS_METADATA_ENDPOINT=http://169.254.169.254",
                ));
            }
        }
    }
    if !is_set(&["AWS_REGION", "AWS_DEFAULT_REGION"]) {
        builder = builder.with_region(profile.get("region").unwrap_or("us-east-1"));
    }
    let endpoint = builder
        .get_config_value(&AmazonS3ConfigKey::S3Endpoint)
        .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint))
        .or_else(|| profile.get("endpoint_url").map(str::to_owned));
    let is_plain = endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    if let Some(endpoint) = endpoint {
        if !is_plain && !endpoint.starts_with("https://") {
            return Err(Error::usage(format!("the endpoint {endpoint:?} is no URL"))
                .hint("set AWS_ENDPOINT_URL to something like https://s3.example.com"));
        }
        builder = builder.with_endpoint(endpoint);
    }
    builder
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retries(patience))
        .with_client_options(client_options(is_plain, variables)?)
        .with_http_connector(traffic.connector())
        .build()
        .map_err(|error| unfit(url, &error))
}
