package vm_test

import (
	"context"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/rpc"
)

func TestTry(t *testing.T) {
	ctx := context.Background()
	t0 := time.Now()
	a, err := machine.Prepare(ctx, t.TempDir(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("assets", time.Since(t0))
	t0 = time.Now()
	m, err := machine.Start(ctx, machine.Options{Assets: a, Netdev: "user,id=n0"})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	defer func() { t.Log(m.CommandLine()); for _, l := range m.Console() { t.Log(l) } }()
	h, err := m.WaitBoot(ctx, 1)
	t.Log(h, err, time.Since(t0))
	if err != nil {
		return
	}
	t.Log(m.Exec(ctx, "dhclient", "-ipv6=false", "eth0"))
	t.Log(m.Link(ctx, rpc.LinkArgs{Name: "eth0"}))
	t.Log(m.Ping(ctx, rpc.PingArgs{Addr: "10.0.2.2", Size: 56, Count: 3}))
	t.Log(m.Exec(ctx, "ethtool", "-k", "eth0"))
	t.Log(m.Features(ctx, "eth0"))
	t.Log(m.PID())
	t.Log(m.QMP(ctx, "query-status", nil))
}
