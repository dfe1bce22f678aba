package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/vhostd/vhostd/backend"
)

// maxScrapers is how many connections for metrics there are at a time; others wait in the host's backlog.
const maxScrapers = 32

// serveMetrics serves /metrics, and Go's profiles if profiles is set, until it is closed.
func serveMetrics(addr string, profiles bool, ours prometheus.Collector, log *slog.Logger) (io.Closer, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(ours, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	if profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	l, err := listenTCP(addr)
	if err != nil {
		return nil, err
	}
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      2 * time.Minute, // for a profile of some time, too
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go func() {
		// Whoever connects and reads nothing takes no descriptors that a front-end needs.
		if err := server.Serve(netutil.LimitListener(l, maxScrapers)); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics are served no more", "error", err)
		}
	}()
	log.Info("serving metrics", "url", "http://"+l.Addr().String()+"/metrics", "pprof", profiles)
	return server, nil
}

// listenTCP listens for TCP and not, as Go prefers to, for MPTCP, which Landlock takes for something else: who takes a confined vhostd over that may connect to
// UNIX sockets could have such a listener connect to any address.
func listenTCP(addr string) (net.Listener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	return c.Listen(context.Background(), "tcp", addr)
}

// collector reads the counters when it is scraped: nothing is kept twice, and nothing is done while nobody asks.
type collector func() report

// metric is a value that all queues, or the back-end, have one of.
type metric[T any] struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(T) float64
}

func counter[T any](name, help string, labels []string, value func(T) float64) metric[T] {
	return metric[T]{prometheus.NewDesc(name+"_total", help, labels, nil), prometheus.CounterValue, value}
}

func gauge[T any](name, help string, labels []string, value func(T) float64) metric[T] {
	return metric[T]{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue, value}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

type queueStats = backend.QueueStats

var queueLabels = []string{"queue", "direction"}

var queueMetrics = []metric[queueStats]{
	gauge("vhostd_queue_started", "Whether the front-end has started the ring.", queueLabels, func(q queueStats) float64 { return truth(q.Started) }),
	gauge("vhostd_queue_enabled", "Whether the front-end has enabled the ring.", queueLabels, func(q queueStats) float64 { return truth(q.Enabled) }),
	gauge("vhostd_queue_broken", "Whether the ring stands still for a fault.", queueLabels, func(q queueStats) float64 { return truth(q.Broken != "") }),
	counter("vhostd_queue_frames", "Frames moved.", queueLabels, func(q queueStats) float64 { return float64(q.Frames) }),
	counter("vhostd_queue_bytes", "Bytes of the frames moved.", queueLabels, func(q queueStats) float64 { return float64(q.Bytes) }),
	gauge("vhostd_queue_pending_frames", "Frames whose pages are with the device.", queueLabels, func(q queueStats) float64 { return float64(q.Pending) }),
	gauge("vhostd_queue_pending_frames_max", "The most that were pending at a time.", queueLabels, func(q queueStats) float64 { return float64(q.MaxPending) }),
	gauge("vhostd_queue_head_wait_seconds_max", "The longest that the used ring waited for one frame.", queueLabels,
		func(q queueStats) float64 { return time.Duration(q.MaxWaitNs).Seconds() }),
	counter("vhostd_queue_given_up", "Used elements written at a deadline although the device still held the pages.", queueLabels, func(q queueStats) float64 { return float64(q.GivenUp) }),
	counter("vhostd_queue_malformed", "Chains that were returned unused because of their shape.", queueLabels, func(q queueStats) float64 { return float64(q.Malformed) }),
	counter("vhostd_queue_invalid", "Frames dropped for a virtio-net header that makes no sense.", queueLabels, func(q queueStats) float64 { return float64(q.Invalid) }),
	counter("vhostd_queue_too_big", "Frames dropped because the guest's buffers cannot hold them.", queueLabels, func(q queueStats) float64 { return float64(q.TooBig) }),
	counter("vhostd_queue_no_room", "Times a frame waited because the guest had posted too little.", queueLabels, func(q queueStats) float64 { return float64(q.NoRoom) }),
	counter("vhostd_queue_send_dropped", "Frames that the host's device refused.", queueLabels, func(q queueStats) float64 { return float64(q.SendDropped) }),
	counter("vhostd_queue_recv_dropped", "Frames lost inside the host's device.", queueLabels, func(q queueStats) float64 { return float64(q.RecvDropped) }),
	counter("vhostd_queue_kicks", "Notifications from the driver.", queueLabels, func(q queueStats) float64 { return float64(q.Kicks) }),
	counter("vhostd_queue_calls", "Notifications to the driver.", queueLabels, func(q queueStats) float64 { return float64(q.Calls) }),
	counter("vhostd_queue_waits", "Times the worker went to sleep.", queueLabels, func(q queueStats) float64 { return float64(q.Waits) }),
	counter("vhostd_queue_notify_errors", "Calls that could not be made.", queueLabels, func(q queueStats) float64 { return float64(q.NotifyErrors) }),
}

var backendMetrics = []metric[report]{
	gauge("vhostd_front_end_connected", "Whether a VMM is connected.", nil, func(r report) float64 { return truth(r.Connected) }),
	counter("vhostd_sessions", "Front-ends that have connected.", nil, func(r report) float64 { return float64(r.Sessions) }),
	counter("vhostd_front_end_errors", "Requests refused and sessions ended for a fault of the front-end.", nil, func(r report) float64 { return float64(r.FrontEndErrors) }),
	counter("vhostd_guest_errors", "Rings stopped for a fault of the guest.", nil, func(r report) float64 { return float64(r.GuestErrors) }),
	gauge("vhostd_guest_memory_regions", "Regions of guest memory.", nil, func(r report) float64 { return float64(r.MemoryRegions) }),
	gauge("vhostd_guest_memory_bytes", "Guest memory that is mapped.", nil, func(r report) float64 { return float64(r.MemoryBytes) }),
}

var (
	infoDesc = prometheus.NewDesc("vhostd_info", "Which vhostd this is and what it serves; always 1.",
		[]string{"version", "socket", "device", "name"}, nil)
	outcomeDesc = prometheus.NewDesc("vhostd_queue_outcomes_total", "Frames from the guest by what became of their pages.",
		append(queueLabels, "outcome"), nil)
)

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- infoDesc
	ch <- outcomeDesc
	for _, m := range backendMetrics {
		ch <- m.desc
	}
	for _, m := range queueMetrics {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	r := c()
	ch <- prometheus.MustNewConstMetric(infoDesc, prometheus.GaugeValue, 1,
		r.Daemon.Version, r.Daemon.Socket, r.Device.Kind, r.Device.Name)
	for _, m := range backendMetrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(r))
	}
	for _, q := range r.Queues {
		index := strconv.Itoa(q.Index)
		for _, m := range queueMetrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(q), index, q.Direction)
		}
		if q.Direction != fromGuest {
			continue
		}
		for _, o := range outcomes {
			ch <- prometheus.MustNewConstMetric(outcomeDesc, prometheus.CounterValue, float64(q.Outcomes[o]), index, q.Direction, o)
		}
	}
}
